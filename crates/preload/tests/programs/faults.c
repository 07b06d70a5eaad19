/* The program's own SIGSEGV handler works, whether it came before or after /dev/kvm was opened. */
#include "vm.h"
#include <setjmp.h>

static sigjmp_buf jump;
static volatile uintptr_t address;
static volatile int on_stack;
static char *stack;

static void segv(int signal, siginfo_t *info, void *context)
{
	char here;
	address = (uintptr_t)info->si_addr;
	on_stack = &here >= stack && &here < stack + 65536;
	siglongjmp(jump, 1);
}

static void fault(volatile char *at)
{
	if (sigsetjmp(jump, 1) == 0) {
		*at = 1;
		CHECK(!"a fault");
	}
	CHECK(address == (uintptr_t)at);
}

int main(void)
{
	struct sigaction action = { .sa_sigaction = segv, .sa_flags = SA_SIGINFO | SA_ONSTACK };
	struct sigaction now;
	struct vm m;
	pid_t child;
	int status;

	CHECK((stack = malloc(65536)) != NULL);
	CHECK(sigaltstack(&(stack_t){ .ss_sp = stack, .ss_size = 65536 }, NULL) == 0);
	CHECK(sigaction(SIGSEGV, &action, NULL) == 0);
	fault((char *)8);
	m = new_spinning_vm();
	fault((char *)16);
	CHECK(on_stack);
	FAILS(ioctl(m.vcpu, KVM_SET_REGS, NULL), EFAULT);
	CHECK(address == 16);
	CHECK(sigaction(SIGSEGV, NULL, &now) == 0 && now.sa_sigaction == segv);

	action.sa_flags = SA_SIGINFO | SA_NODEFER;
	CHECK(sigaction(SIGSEGV, &action, &now) == 0 && now.sa_sigaction == segv);
	fault((char *)24);
	CHECK(!on_stack);
	FAILS(ioctl(m.vcpu, KVM_SET_REGS, NULL), EFAULT);
	fault((char *)32);

	/* One use. The copy's own faults do not count. */
	action.sa_flags = SA_SIGINFO | SA_RESETHAND;
	CHECK(sigaction(SIGSEGV, &action, NULL) == 0);
	FAILS(ioctl(m.vcpu, KVM_SET_REGS, NULL), EFAULT);
	fault((char *)40);
	CHECK(sigaction(SIGSEGV, NULL, &now) == 0 && now.sa_handler == SIG_DFL);
	FAILS(ioctl(m.vcpu, KVM_SET_REGS, NULL), EFAULT);

	/* Without a handler a fault is the end, and so is a signal that was sent. */
	for (int sent = 0; sent < 2; sent++) {
		CHECK((child = fork()) >= 0);
		if (child == 0) {
			if (sent)
				raise(SIGSEGV);
			else
				*(volatile char *)48 = 1;
			_exit(0);
		}
		CHECK(waitpid(child, &status, 0) == child);
		CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV);
	}
	/* Ignoring SIGSEGV ignores sent ones only. */
	CHECK(signal(SIGSEGV, SIG_IGN) == SIG_DFL);
	CHECK(raise(SIGSEGV) == 0);
	FAILS(ioctl(m.vcpu, KVM_SET_REGS, NULL), EFAULT);
	return 0;
}
