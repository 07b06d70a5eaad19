/* Duplicates share an object, and the last close frees it. */
#include "vm.h"

int main(void)
{
	int before = descriptors(), copy, fd;
	struct vm m = new_spinning_vm();
	struct kvm_regs regs;

	/* Close-on-exec, as KVM makes its descriptors. */
	CHECK(fcntl(m.vm, F_GETFD) == FD_CLOEXEC);
	CHECK(fcntl(m.vcpu, F_GETFD) == FD_CLOEXEC);

	/* Every kind of duplicate is the same vCPU, also when the original is gone. */
	CHECK((copy = dup(m.vcpu)) >= 0);
	CHECK(ioctl(copy, KVM_GET_REGS, &regs) == 0);
	CHECK(close(m.vcpu) == 0);
	FAILS(ioctl(m.vcpu, KVM_GET_REGS, &regs), EBADF);
	CHECK((m.vcpu = fcntl(copy, F_DUPFD_CLOEXEC, 100)) >= 100);
	CHECK(close(copy) == 0);
	CHECK(ioctl(m.vcpu, KVM_GET_REGS, &regs) == 0);
	CHECK((fd = open("/dev/null", O_RDWR)) >= 0);
	CHECK(dup2(m.vcpu, fd) == fd);
	CHECK(ioctl(fd, KVM_GET_REGS, &regs) == 0);
	CHECK(dup3(m.vcpu, fd, O_CLOEXEC) == fd);
	CHECK(ioctl(fd, KVM_GET_REGS, &regs) == 0);
	/* ... and what replaces one is not. */
	CHECK((copy = open("/dev/null", O_RDWR)) >= 0);
	CHECK(dup2(copy, fd) == fd);
	FAILS(ioctl(fd, KVM_GET_REGS, &regs), ENOTTY);
	CHECK(close(fd) == 0 && close(copy) == 0);

	/* A duplicate that the C library knows nothing of. */
	CHECK((copy = syscall(SYS_dup, m.vcpu)) >= 0);
	CHECK(ioctl(copy, KVM_GET_REGS, &regs) == 0);
	CHECK(close(m.vcpu) == 0);
	CHECK(ioctl(copy, KVM_GET_REGS, &regs) == 0);
	m.vcpu = copy;

	/* A vCPU keeps its VM. */
	CHECK(close(m.vm) == 0 && close(m.kvm) == 0);
	CHECK(ioctl(m.vcpu, KVM_GET_REGS, &regs) == 0);
	CHECK(close_range(m.vcpu, m.vcpu, 0) == 0);
	FAILS(ioctl(m.vcpu, KVM_GET_REGS, &regs), EBADF);
	CHECK(descriptors() == before);

	/* Numbers above a thousand. */
	m = new_spinning_vm();
	if ((fd = fcntl(m.vcpu, F_DUPFD, 1000)) >= 0) {
		CHECK(ioctl(fd, KVM_GET_REGS, &regs) == 0);
		CHECK(close(fd) == 0);
	}
	CHECK(close(m.vcpu) == 0 && close(m.vm) == 0 && close(m.kvm) == 0);
	CHECK(descriptors() == before);

	/* Again and again. */
	for (int i = 0; i < 100; i++) {
		m = new_spinning_vm();
		CHECK(munmap(m.run, 12288) == 0);
		CHECK(close(m.kvm) == 0 && close(m.vm) == 0 && close(m.vcpu) == 0);
		CHECK(munmap(m.memory, 65536) == 0);
	}
	CHECK(descriptors() == before);
	return 0;
}
