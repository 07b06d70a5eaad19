/* What the test programs share: a check that names its line, and a VM whose vCPU spins. */
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHECK(condition)                                                      \
	do {                                                                  \
		if (!(condition)) {                                           \
			fprintf(stderr, "%s:%d: not true: %s (errno %d)\n",   \
				__FILE__, __LINE__, #condition, errno);       \
			_exit(1);                                             \
		}                                                             \
	} while (0)

/* The call must fail with this error. */
#define FAILS(call, error)                                                    \
	do {                                                                  \
		errno = 0;                                                    \
		CHECK((call) == -1);                                          \
		CHECK(errno == (error));                                      \
	} while (0)

struct vm {
	int kvm, vm, vcpu;
	struct kvm_run *run;
	uint8_t *memory;
};

/* A VM with 64 KiB of memory and one vCPU in real mode at address 0, where `code` is. */
static inline struct vm new_vm(const void *code, size_t size)
{
	struct vm m;
	struct kvm_sregs sregs;
	struct kvm_regs regs = { .rflags = 2 };
	struct kvm_userspace_memory_region region = { .memory_size = 65536 };

	CHECK((m.kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC)) >= 0);
	CHECK((m.vm = ioctl(m.kvm, KVM_CREATE_VM, 0)) >= 0);
	m.memory = mmap(NULL, 65536, PROT_READ | PROT_WRITE,
			MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(m.memory != MAP_FAILED);
	memcpy(m.memory, code, size);
	region.userspace_addr = (uintptr_t)m.memory;
	CHECK(ioctl(m.vm, KVM_SET_USER_MEMORY_REGION, &region) == 0);
	CHECK((m.vcpu = ioctl(m.vm, KVM_CREATE_VCPU, 0)) >= 0);
	m.run = mmap(NULL, 12288, PROT_READ | PROT_WRITE, MAP_SHARED, m.vcpu, 0);
	CHECK(m.run != MAP_FAILED);
	CHECK(ioctl(m.vcpu, KVM_GET_SREGS, &sregs) == 0);
	sregs.cs.base = 0;
	sregs.cs.selector = 0;
	CHECK(ioctl(m.vcpu, KVM_SET_SREGS, &sregs) == 0);
	CHECK(ioctl(m.vcpu, KVM_SET_REGS, &regs) == 0);
	return m;
}

/* jmp $ */
static inline struct vm new_spinning_vm(void)
{
	return new_vm("\xeb\xfe", 2);
}

/* How many descriptors are open. */
static inline int descriptors(void)
{
	int count = 0;
	for (int fd = 0; fd < 256; fd++)
		count += fcntl(fd, F_GETFD) >= 0;
	return count;
}
