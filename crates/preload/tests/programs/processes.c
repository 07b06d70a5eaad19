/* A VM belongs to the process that made it. */
#include "vm.h"

static int ended_well(pid_t child)
{
	int status;
	CHECK(waitpid(child, &status, 0) == child);
	return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

/* What a program finds that was executed with descriptors of the one before. */
static int executed(int kvm, int vm, int vcpu)
{
	struct kvm_regs regs;
	CHECK(ioctl(kvm, KVM_GET_API_VERSION, 0) == 12);
	CHECK(close(ioctl(kvm, KVM_CREATE_VM, 0)) == 0);
	FAILS(ioctl(vm, KVM_CREATE_VCPU, 1), EIO);
	FAILS(ioctl(vcpu, KVM_GET_REGS, &regs), EIO);
	return 0;
}

int main(int argc, char **argv)
{
	if (argc == 4)
		return executed(atoi(argv[1]), atoi(argv[2]), atoi(argv[3]));
	struct vm m = new_spinning_vm(), other;
	struct kvm_regs regs;
	pid_t child;

	CHECK((child = fork()) >= 0);
	if (child == 0) {
		FAILS(ioctl(m.vcpu, KVM_GET_REGS, &regs), EIO);
		FAILS(ioctl(m.vm, KVM_CREATE_VCPU, 1), EIO);
		/* /dev/kvm belongs to nobody, and the child can have VMs of its own. */
		CHECK(ioctl(m.kvm, KVM_GET_API_VERSION, 0) == 12);
		other = new_spinning_vm();
		CHECK(ioctl(other.vcpu, KVM_GET_REGS, &regs) == 0);
		CHECK(close(other.vcpu) == 0 && close(other.vm) == 0);
		CHECK(close(m.vcpu) == 0 && close(m.vm) == 0);
		FAILS(ioctl(m.vcpu, KVM_GET_REGS, &regs), EBADF);
		_exit(0);
	}
	CHECK(ended_well(child));
	CHECK(ioctl(m.vcpu, KVM_GET_REGS, &regs) == 0);

	/* A vfork child shares memory, but closes descriptors of its own. */
	CHECK((child = vfork()) >= 0);
	if (child == 0) {
		close(m.vcpu);
		close(m.vm);
		dup2(m.kvm, m.vcpu);
		signal(SIGUSR1, SIG_IGN);
		_exit(0);
	}
	CHECK(ended_well(child));
	CHECK(ioctl(m.vcpu, KVM_GET_REGS, &regs) == 0);
	CHECK(signal(SIGUSR1, SIG_DFL) == SIG_DFL);

	/* Without close-on-exec, only /dev/kvm is of use to the next program. */
	CHECK((child = fork()) >= 0);
	if (child == 0) {
		char fds[3][16];
		snprintf(fds[0], 16, "%d", dup(m.kvm));
		snprintf(fds[1], 16, "%d", dup(m.vm));
		snprintf(fds[2], 16, "%d", dup(m.vcpu));
		execl(argv[0], argv[0], fds[0], fds[1], fds[2], NULL);
		_exit(1);
	}
	CHECK(ended_well(child));

	/* With it, nothing is left. */
	CHECK((child = fork()) >= 0);
	if (child == 0) {
		char test[64];
		snprintf(test, sizeof(test), "test ! -e /proc/self/fd/%d", m.vcpu);
		execl("/bin/sh", "sh", "-c", test, NULL);
		_exit(1);
	}
	CHECK(ended_well(child));
	return 0;
}
