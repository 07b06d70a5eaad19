/* KVM_SET_SIGNAL_MASK: a mask for the time of KVM_RUN. */
#include "vm.h"

static struct vm m;
static pthread_t vcpu_thread;
static volatile int calls;

static void count(int signal)
{
	calls++;
}

static void *kick(void *signal)
{
	usleep(20000);
	pthread_kill(vcpu_thread, (intptr_t)signal);
	return NULL;
}

/* The mask that lets through everything but `blocked` (or everything). */
static int set_mask(uint32_t len, int blocked)
{
	struct {
		struct kvm_signal_mask head;
		uint64_t set;
	} __attribute__((packed)) mask = { .head.len = len };
	mask.set = blocked ? 1ull << (blocked - 1) : 0;
	return ioctl(m.vcpu, KVM_SET_SIGNAL_MASK, &mask);
}

static void run_until(int signal)
{
	pthread_t other;
	CHECK(pthread_create(&other, NULL, kick, (void *)(intptr_t)signal) == 0);
	FAILS(ioctl(m.vcpu, KVM_RUN, 0), EINTR);
	CHECK(pthread_join(other, NULL) == 0);
}

/* Takes a pending signal. */
static int eat(sigset_t *set, siginfo_t *info)
{
	struct timespec now = { 0 };
	return sigtimedwait(set, info, &now);
}

int main(void)
{
	sigset_t usr1, rt, all, before, after;
	siginfo_t info;
	struct kvm_regs regs;

	m = new_spinning_vm();
	vcpu_thread = pthread_self();
	sigemptyset(&usr1);
	sigaddset(&usr1, SIGUSR1);
	sigemptyset(&rt);
	sigaddset(&rt, SIGRTMIN);

	FAILS(set_mask(4, 0), EINVAL);
	FAILS(set_mask(16, 0), EINVAL);

	/* Let through by the mask, blocked by the thread: EINTR, and still pending. No handler. */
	CHECK(pthread_sigmask(SIG_BLOCK, &usr1, NULL) == 0);
	CHECK(pthread_sigmask(SIG_BLOCK, &rt, NULL) == 0);
	CHECK(pthread_sigmask(SIG_BLOCK, NULL, &before) == 0);
	CHECK(set_mask(8, 0) == 0);
	run_until(SIGUSR1);
	CHECK(eat(&usr1, &info) == SIGUSR1 && info.si_code == SI_USER);
	CHECK(eat(&usr1, &info) == -1);
	CHECK(pthread_sigmask(SIG_BLOCK, NULL, &after) == 0);
	CHECK(memcmp(&before, &after, 8) == 0);

	/* The same if it was pending already; it ends every KVM_RUN until it is taken. */
	CHECK(pthread_kill(vcpu_thread, SIGUSR1) == 0);
	FAILS(ioctl(m.vcpu, KVM_RUN, 0), EINTR);
	FAILS(ioctl(m.vcpu, KVM_RUN, 0), EINTR);
	CHECK(eat(&usr1, &info) == SIGUSR1);

	/* The same with a handler, which runs when the thread unblocks the signal. */
	CHECK(signal(SIGUSR1, count) == SIG_DFL);
	run_until(SIGUSR1);
	CHECK(calls == 0);
	CHECK(pthread_sigmask(SIG_UNBLOCK, &usr1, NULL) == 0);
	CHECK(calls == 1);

	/* Unblocked by both: EINTR and the handler. */
	run_until(SIGUSR1);
	CHECK(calls == 2);

	/* Blocked by the mask: it waits for KVM_RUN to end for another reason. */
	CHECK(set_mask(8, SIGUSR1) == 0);
	CHECK(pthread_kill(vcpu_thread, SIGUSR1) == 0);
	CHECK(calls == 3);
	run_until(SIGRTMIN);
	CHECK(eat(&rt, &info) == SIGRTMIN);

	/* No mask: the thread's own. */
	CHECK(ioctl(m.vcpu, KVM_SET_SIGNAL_MASK, NULL) == 0);
	CHECK(pthread_kill(vcpu_thread, SIGRTMIN) == 0);
	run_until(SIGUSR1);
	CHECK(calls == 4);
	CHECK(eat(&rt, &info) == SIGRTMIN);

	/* With everything blocked in the thread, copies may still fault. */
	sigfillset(&all);
	CHECK(pthread_sigmask(SIG_SETMASK, &all, NULL) == 0);
	FAILS(ioctl(m.vcpu, KVM_GET_REGS, (void *)8), EFAULT);
	CHECK(ioctl(m.vcpu, KVM_GET_REGS, &regs) == 0);
	CHECK(pthread_sigmask(SIG_SETMASK, NULL, &after) == 0);
	CHECK(sigismember(&after, SIGSEGV) == 1 && sigismember(&after, SIGTRAP) == 1);

	/* The default action still works where it is due. */
	pid_t child = fork();
	CHECK(child >= 0);
	if (child == 0) {
		CHECK(pthread_sigmask(SIG_UNBLOCK, &rt, NULL) == 0);
		raise(SIGRTMIN);
		_exit(0);
	}
	int status;
	CHECK(waitpid(child, &status, 0) == child);
	CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGRTMIN);
	return 0;
}
