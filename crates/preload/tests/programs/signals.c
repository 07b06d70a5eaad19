/* Signals end KVM_RUN with EINTR, and their handlers run after it. */
#include "vm.h"
#include <fenv.h>
#include <setjmp.h>
#include <time.h>

static struct vm m;
static pthread_t vcpu_thread;
static volatile int calls, code, value, nested, jumps, masked;
static sigjmp_buf jump;

/* Sends a signal to the vCPU's thread, a moment from now. */
static void *kick(void *signal)
{
	usleep(20000);
	pthread_kill(vcpu_thread, (intptr_t)signal);
	return NULL;
}

static void *kick_with_value(void *signal)
{
	usleep(20000);
	pthread_sigqueue(vcpu_thread, (intptr_t)signal, (union sigval){ .sival_int = 1234 });
	return NULL;
}

static void run_until(void *(*thread)(void *), int signal)
{
	pthread_t other;
	CHECK(pthread_create(&other, NULL, thread, (void *)(intptr_t)signal) == 0);
	FAILS(ioctl(m.vcpu, KVM_RUN, 0), EINTR);
	CHECK(pthread_join(other, NULL) == 0);
}

static void count(int signal)
{
	calls++;
	errno = EDOM;
}

/* One that may interrupt what has just looked at errno. */
static void count_quietly(int signal)
{
	calls++;
}

static void with_info(int signal, siginfo_t *info, void *context)
{
	calls++;
	code = info->si_code;
	value = info->si_value.sival_int;
}

/* What a handler inside the run loop could not do. */
static void with_ioctl(int signal)
{
	struct kvm_regs regs;
	calls++;
	CHECK(ioctl(m.vcpu, KVM_GET_REGS, &regs) == 0);
	CHECK(regs.rip == 0);
	m.run->immediate_exit = 1;
	FAILS(ioctl(m.vcpu, KVM_RUN, 0), EINTR);
	m.run->immediate_exit = 0;
	nested++;
}

static void with_jump(int signal)
{
	jumps++;
	siglongjmp(jump, 1);
}

static void with_mask(int signal)
{
	sigset_t now;
	CHECK(pthread_sigmask(SIG_BLOCK, NULL, &now) == 0);
	calls++;
	masked = sigismember(&now, SIGUSR1) && sigismember(&now, SIGUSR2) &&
		 !sigismember(&now, SIGINT) && !sigismember(&now, SIGTERM);
}

static void install(int signal, void *handler, int flags)
{
	struct sigaction action = { .sa_flags = flags }, now;
	action.sa_sigaction = handler;
	sigemptyset(&action.sa_mask);
	CHECK(sigaction(signal, &action, NULL) == 0);
	/* The program sees what it installed. */
	CHECK(sigaction(signal, NULL, &now) == 0);
	CHECK(now.sa_sigaction == handler);
	CHECK((now.sa_flags & ~0x04000000) == flags);
	calls = 0;
}

static void *many_kicks(void *stop)
{
	/* With pauses of all lengths, but never faster than the handler can run. */
	for (unsigned i = 0; !*(volatile int *)stop; i++) {
		pthread_kill(vcpu_thread, SIGUSR1);
		usleep(i % 8);
	}
	return NULL;
}

int main(void)
{
	struct sigaction action = { .sa_handler = with_mask };
	volatile double one = 1, three = 3;
	volatile int stop = 0;
	sigset_t before, after;
	pthread_t other;

	m = new_spinning_vm();
	vcpu_thread = pthread_self();

	/* EINTR with and without SA_RESTART, by real-time signals, by signal(). */
	install(SIGUSR1, count, 0);
	run_until(kick, SIGUSR1);
	CHECK(calls == 1);
	install(SIGUSR1, count, SA_RESTART);
	run_until(kick, SIGUSR1);
	CHECK(calls == 1);
	install(SIGRTMIN, count, SA_RESTART);
	run_until(kick, SIGRTMIN);
	CHECK(calls == 1);
	CHECK(signal(SIGRTMIN + 1, count) == SIG_DFL);
	run_until(kick, SIGRTMIN + 1);
	CHECK(calls == 2);
	CHECK(signal(SIGRTMIN + 1, SIG_DFL) == count);

	/* The original siginfo. */
	install(SIGUSR1, with_info, SA_SIGINFO);
	run_until(kick, SIGUSR1);
	CHECK(calls == 1 && code == SI_TKILL);
	run_until(kick_with_value, SIGUSR1);
	CHECK(calls == 2 && code == SI_QUEUE && value == 1234);

	/* Handlers that use the vCPU, and that do not return. */
	install(SIGUSR1, with_ioctl, 0);
	run_until(kick, SIGUSR1);
	CHECK(calls == 1 && nested == 1);
	install(SIGUSR1, with_jump, 0);
	CHECK(pthread_sigmask(SIG_BLOCK, NULL, &before) == 0);
	for (volatile int i = 0; i < 3; i++) {
		if (sigsetjmp(jump, 1) == 0)
			run_until(kick, SIGUSR1);
		CHECK(jumps == i + 1);
	}
	CHECK(pthread_sigmask(SIG_BLOCK, NULL, &after) == 0);
	CHECK(memcmp(&before, &after, 8) == 0);

	/* The mask in a handler, and after it. */
	sigemptyset(&action.sa_mask);
	sigaddset(&action.sa_mask, SIGUSR2);
	CHECK(sigaction(SIGUSR1, &action, NULL) == 0);
	calls = 0;
	run_until(kick, SIGUSR1);
	CHECK(calls == 1 && masked);
	CHECK(pthread_sigmask(SIG_BLOCK, NULL, &after) == 0);
	CHECK(memcmp(&before, &after, 8) == 0);

	/* SA_RESETHAND. */
	install(SIGUSR1, count, SA_RESETHAND);
	run_until(kick, SIGUSR1);
	CHECK(calls == 1);
	CHECK(signal(SIGUSR1, SIG_DFL) == SIG_DFL);

	/* The floating-point environment survives the detour. */
	install(SIGUSR1, count, 0);
	CHECK(fesetround(FE_UPWARD) == 0);
	run_until(kick, SIGUSR1);
	CHECK(fegetround() == FE_UPWARD);
	CHECK(one / three > 1.0 / 3.0);
	CHECK(fesetround(FE_TONEAREST) == 0);

	/* immediate_exit. */
	m.run->immediate_exit = 1;
	FAILS(ioctl(m.vcpu, KVM_RUN, 0), EINTR);
	m.run->immediate_exit = 0;

	/* Any number of kicks: every KVM_RUN ends, and every end was a handler's. */
	install(SIGUSR1, count_quietly, 0);
	CHECK(pthread_create(&other, NULL, many_kicks, (void *)&stop) == 0);
	for (int i = 0; i < 20000; i++) {
		int seen = calls;
		FAILS(ioctl(m.vcpu, KVM_RUN, 0), EINTR);
		CHECK(calls > seen);
	}
	stop = 1;
	CHECK(pthread_join(other, NULL) == 0);

	/* Ignored signals do not end it: only the second one does. */
	CHECK(signal(SIGUSR2, SIG_IGN) == SIG_DFL);
	calls = 0;
	CHECK(pthread_create(&other, NULL, kick, (void *)SIGUSR2) == 0);
	run_until(kick, SIGUSR1);
	CHECK(pthread_join(other, NULL) == 0);
	CHECK(calls == 1);
	return 0;
}
