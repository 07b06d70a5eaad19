/* Several mappings of a vCPU are one memory; page 2 is one memory for all vCPUs of a VM. */
#include "vm.h"

int main(void)
{
	struct vm m = new_spinning_vm(), n = new_spinning_vm();
	int vcpu = ioctl(m.vm, KVM_CREATE_VCPU, 1), copy = dup(m.vcpu);
	int flags = MAP_SHARED, both = PROT_READ | PROT_WRITE;
	uint8_t *a = (uint8_t *)m.run, *b, *c, *ring, *other = (uint8_t *)n.run;

	CHECK(vcpu >= 0 && copy >= 0);
	b = mmap(NULL, 12288, both, flags, copy, 0);
	c = mmap(NULL, 12288, both, flags, vcpu, 0);
	ring = mmap(NULL, 4096, both, flags, vcpu, 8192);
	CHECK(b != MAP_FAILED && c != MAP_FAILED && ring != MAP_FAILED);
	m.run->request_interrupt_window = 7;
	CHECK(((struct kvm_run *)b)->request_interrupt_window == 7);
	CHECK(((struct kvm_run *)c)->request_interrupt_window == 0);
	a[8192 + 100] = 9;
	CHECK(b[8192 + 100] == 9);
	CHECK(c[8192 + 100] == 9);
	CHECK(ring[100] == 9);
	CHECK(other[8192 + 100] == 0);
	CHECK(munmap(ring, 4096) == 0 && munmap(c, 12288) == 0);
	/* A mapping outlives its descriptor. */
	CHECK(close(copy) == 0 && close(m.vcpu) == 0);
	CHECK(b[8192 + 100] == 9);
	CHECK(((struct kvm_run *)b)->request_interrupt_window == 7);
	return 0;
}
