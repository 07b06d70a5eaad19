/* Kicks at any moment lose no exit, and no kick is lost: a vCPU that writes to a port, and one that
 * has halted. */
#include "vm.h"

static struct vm m;
static pthread_t vcpu_thread;
static volatile int calls, sent, asked, done;

static void count(int signal)
{
	calls++;
}

/* As QEMU does it: a kick that comes before KVM_RUN must end that, too. */
static void immediate(int signal)
{
	m.run->immediate_exit = 1;
}

static void *kick_often(void *unused)
{
	union sigval value = { .sival_int = 0 };
	for (unsigned i = 0; !done; i++) {
		if (pthread_sigqueue(vcpu_thread, SIGRTMIN, value) == 0)
			sent++;
		usleep(i % 16);
	}
	return NULL;
}

static void *kick_when_asked(void *unused)
{
	for (int i = 1; i <= 2000; i++) {
		while (asked < i)
			sched_yield();
		for (volatile int delay = (i * 37) % 5000; delay > 0; delay--)
			;
		pthread_kill(vcpu_thread, SIGUSR1);
	}
	return NULL;
}

int main(void)
{
	/* mov dx, 0x10; 1: out dx, ax; inc ax; jmp 1b */
	static const char out[] = "\xba\x10\x00\xef\x40\xeb\xfc";
	uint16_t expected = 0;
	int interrupted = 0;
	pthread_t other;

	m = new_vm(out, sizeof(out));
	vcpu_thread = pthread_self();
	CHECK(signal(SIGRTMIN, count) == SIG_DFL);
	CHECK(signal(SIGUSR1, immediate) == SIG_DFL);
	CHECK(pthread_create(&other, NULL, kick_often, NULL) == 0);
	for (int exits = 0; exits < 200000;) {
		if (ioctl(m.vcpu, KVM_RUN, 0) < 0) {
			CHECK(m.run->exit_reason == KVM_EXIT_INTR);
			interrupted++;
			continue;
		}
		CHECK(m.run->exit_reason == KVM_EXIT_IO);
		CHECK(m.run->io.port == 0x10 && m.run->io.size == 2 && m.run->io.count == 1);
		CHECK(*(uint16_t *)((char *)m.run + m.run->io.data_offset) == expected++);
		exits++;
	}
	done = 1;
	CHECK(pthread_join(other, NULL) == 0);
	CHECK(calls == sent && interrupted <= sent);

	/* hlt, with the interrupt controllers in the kernel: KVM_RUN sleeps. */
	m.kvm = open("/dev/kvm", O_RDWR);
	CHECK((m.vm = ioctl(m.kvm, KVM_CREATE_VM, 0)) >= 0);
	CHECK(ioctl(m.vm, KVM_CREATE_IRQCHIP, 0) == 0);
	struct kvm_userspace_memory_region region = {
		.memory_size = 65536, .userspace_addr = (uintptr_t)m.memory,
	};
	struct kvm_sregs sregs;
	struct kvm_regs regs = { .rflags = 2 };
	memcpy(m.memory, "\xf4\xeb\xfd", 3);
	CHECK(ioctl(m.vm, KVM_SET_USER_MEMORY_REGION, &region) == 0);
	CHECK((m.vcpu = ioctl(m.vm, KVM_CREATE_VCPU, 0)) >= 0);
	m.run = mmap(NULL, 12288, PROT_READ | PROT_WRITE, MAP_SHARED, m.vcpu, 0);
	CHECK(ioctl(m.vcpu, KVM_GET_SREGS, &sregs) == 0);
	sregs.cs.base = sregs.cs.selector = 0;
	CHECK(ioctl(m.vcpu, KVM_SET_SREGS, &sregs) == 0);
	CHECK(ioctl(m.vcpu, KVM_SET_REGS, &regs) == 0);
	CHECK(pthread_create(&other, NULL, kick_when_asked, NULL) == 0);
	for (int i = 1; i <= 2000; i++) {
		asked = i;
		FAILS(ioctl(m.vcpu, KVM_RUN, 0), EINTR);
		m.run->immediate_exit = 0;
	}
	CHECK(pthread_join(other, NULL) == 0);
	return 0;
}
