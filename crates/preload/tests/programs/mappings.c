/* Several mappings of a vCPU are one memory; page 2 is one memory for all vCPUs of a VM. */
#include <setjmp.h>
#include <signal.h>

#include "vm.h"

#define RINGS 65536
/* KVM_DIRTY_LOG_PAGE_OFFSET */
#define FIRST 64

static sigjmp_buf nothing;

static void fault(int signal)
{
	(void)signal;
	siglongjmp(nothing, 1);
}

/* Whether there is memory at this address. */
static int is_there(volatile uint8_t *at)
{
	if (sigsetjmp(nothing, 1))
		return 0;
	(void)*at;
	return 1;
}

/* A vCPU with a dirty ring: its three pages, nothing, the ring, nothing. */
static void with_ring(void)
{
	struct kvm_enable_cap cap = { .cap = KVM_CAP_DIRTY_LOG_RING, .args = { RINGS } };
	int kvm = open("/dev/kvm", O_RDWR), vm = ioctl(kvm, KVM_CREATE_VM, 0), vcpu;
	uint8_t *all, *end;

	CHECK(ioctl(vm, KVM_ENABLE_CAP, &cap) == 0);
	CHECK((vcpu = ioctl(vm, KVM_CREATE_VCPU, 0)) >= 0);
	CHECK(signal(SIGBUS, fault) != SIG_ERR);
	all = mmap(NULL, (FIRST + 20) * 4096, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	CHECK(all != MAP_FAILED);
	for (int page = 0; page < FIRST + 20; page++) {
		int there = page < 3 || (page >= FIRST && page < FIRST + RINGS / 4096);
		CHECK(is_there(all + page * 4096) == there);
	}
	/* The same pages, mapped from the middle. */
	end = mmap(NULL, 5 * 4096, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, (FIRST - 2) * 4096);
	CHECK(end != MAP_FAILED);
	CHECK(!is_there(end) && !is_there(end + 4096) && is_there(end + 8192));
	CHECK(close(vcpu) == 0 && close(vm) == 0 && close(kvm) == 0);
}

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
	with_ring();
	return 0;
}
