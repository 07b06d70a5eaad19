/* KVM_RUN and its kicks under a filter as VMMs put it on vCPU threads: everything the run loop is
 * not promised kills the process. */
#include "vm.h"
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/prctl.h>

static struct vm m;
static pthread_t vcpu_thread;
static volatile int calls, ready;

static void count(int signal)
{
	calls++;
}

static void *kick(void *unused)
{
	for (int i = 0; i < 100; i++) {
		while (ready <= i)
			usleep(100);
		usleep(1000);
		pthread_kill(vcpu_thread, SIGUSR1);
	}
	return NULL;
}

#define ALLOW(name)                                             \
	BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_##name, 0, 1),  \
	BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)

static struct sock_filter filter[] = {
	BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
	ALLOW(futex), ALLOW(mmap), ALLOW(munmap), ALLOW(madvise), ALLOW(clock_gettime),
	ALLOW(tkill), ALLOW(write), ALLOW(sched_yield), ALLOW(rt_sigreturn),
	ALLOW(exit_group), ALLOW(ioctl),
	BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
};

int main(void)
{
	struct sock_fprog program = { sizeof(filter) / sizeof(*filter), filter };
	struct kvm_regs regs;
	pthread_t other;

	m = new_spinning_vm();
	vcpu_thread = pthread_self();
	CHECK(signal(SIGUSR1, count) == SIG_DFL);
	CHECK(pthread_create(&other, NULL, kick, NULL) == 0);
	CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
	CHECK(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0);
	for (int i = 0; i < 100; i++) {
		ready = i + 1;
		FAILS(ioctl(m.vcpu, KVM_RUN, 0), EINTR);
		CHECK(calls == i + 1);
		CHECK(ioctl(m.vcpu, KVM_GET_REGS, &regs) == 0);
		FAILS(ioctl(m.vcpu, KVM_GET_REGS, NULL), EFAULT);
	}
	return 0;
}
