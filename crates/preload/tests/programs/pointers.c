/* Bad pointers are EFAULT, unknown ioctls are what Linux says, other descriptors are untouched. */
#include "vm.h"
#include <termios.h>

int main(void)
{
	struct vm m = new_spinning_vm();
	char *page = mmap(NULL, 8192, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	void *bad[] = {
		NULL, (void *)8, page + 4096, page + 4094, (void *)0x800000000000,
		(void *)-8, (void *)0xffff888000000000,
	};
	struct kvm_regs regs;
	struct termios termios;
	int pipes[2], waiting = -1;

	CHECK(page != MAP_FAILED);
	CHECK(munmap(page + 4096, 4096) == 0);
	for (unsigned i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
		FAILS(ioctl(m.vcpu, KVM_SET_REGS, bad[i]), EFAULT);
		FAILS(ioctl(m.vcpu, KVM_GET_REGS, bad[i]), EFAULT);
		FAILS(ioctl(m.vcpu, KVM_SET_SREGS, bad[i]), EFAULT);
		FAILS(ioctl(m.vm, KVM_SET_USER_MEMORY_REGION, bad[i]), EFAULT);
		FAILS(ioctl(m.kvm, KVM_GET_MSR_INDEX_LIST, bad[i]), EFAULT);
		if (bad[i])
			FAILS(ioctl(m.vcpu, KVM_SET_SIGNAL_MASK, bad[i]), EFAULT);
	}
	/* Readable is not writable. */
	CHECK(mprotect(page, 4096, PROT_READ) == 0);
	FAILS(ioctl(m.vcpu, KVM_GET_REGS, page), EFAULT);
	CHECK(ioctl(m.vcpu, KVM_SET_REGS, page) == 0);

	FAILS(ioctl(m.kvm, _IO(KVMIO, 0xff), 0), EINVAL);
	FAILS(ioctl(m.vm, _IO(KVMIO, 0xff), 0), ENOTTY);
	FAILS(ioctl(m.vcpu, _IO(KVMIO, 0xff), 0), EINVAL);
	FAILS(ioctl(m.kvm, _IO('x', 1), 0), EINVAL);
	FAILS(ioctl(m.vm, _IO('x', 1), 0), ENOTTY);
	FAILS(ioctl(m.vcpu, _IO('x', 1), 0), EINVAL);
	FAILS(ioctl(m.kvm, KVM_RUN, 0), EINVAL);
	FAILS(ioctl(m.vm, KVM_RUN, 0), ENOTTY);
	FAILS(ioctl(m.vcpu, KVM_RUN, 1), EINVAL);

	CHECK(pipe(pipes) == 0 && write(pipes[1], "abc", 3) == 3);
	CHECK(ioctl(pipes[0], FIONREAD, &waiting) == 0 && waiting == 3);
	FAILS(ioctl(pipes[0], TCGETS, &termios), ENOTTY);
	FAILS(ioctl(pipes[0], KVM_GET_REGS, &regs), ENOTTY);
	FAILS(ioctl(pipes[0], FIONREAD, (void *)8), EFAULT);
	FAILS(ioctl(-1, FIONREAD, &waiting), EBADF);
	FAILS(ioctl(-1, KVM_RUN, 0), EBADF);
	FAILS(ioctl(1 << 30, KVM_RUN, 0), EBADF);
	return 0;
}
