/* Guest RAM that the program takes away: KVM_RUN fails with EFAULT, and works again with the RAM. */
#include "vm.h"

/* mov [0x8000], al; mov al, [0x9000]; hlt */
static const char code[] = "\xa2\x00\x80\xa0\x00\x90\xf4";

static void start(struct vm *m)
{
	struct kvm_regs regs = { .rflags = 2, .rax = 0x42 };
	CHECK(ioctl(m->vcpu, KVM_SET_REGS, &regs) == 0);
}

int main(void)
{
	struct vm m = new_vm(code, sizeof(code));
	int both = PROT_READ | PROT_WRITE, file;
	struct kvm_regs regs;

	start(&m);
	m.memory[0x9000] = 0x99;
	CHECK(ioctl(m.vcpu, KVM_RUN, 0) == 0);
	CHECK(m.run->exit_reason == KVM_EXIT_HLT);
	CHECK(ioctl(m.vcpu, KVM_GET_REGS, &regs) == 0 && (regs.rax & 0xff) == 0x99);
	CHECK(m.memory[0x8000] == 0x42);

	/* SIGSEGV: a store, a load, a fetch. */
	for (int page = 0x8; page >= 0; page = page == 8 ? 9 : page == 9 ? 0 : -1) {
		uint8_t *at = m.memory + page * 4096;
		start(&m);
		CHECK(mprotect(at, 4096, PROT_NONE) == 0);
		FAILS(ioctl(m.vcpu, KVM_RUN, 0), EFAULT);
		CHECK(mprotect(at, 4096, both) == 0);
		start(&m);
		CHECK(ioctl(m.vcpu, KVM_RUN, 0) == 0);
		CHECK(m.run->exit_reason == KVM_EXIT_HLT);
	}

	/* SIGBUS: a file that has become shorter. */
	CHECK((file = memfd_create("ram", 0)) >= 0 && ftruncate(file, 4096) == 0);
	CHECK(mmap(m.memory + 0x8000, 4096, both, MAP_SHARED | MAP_FIXED, file, 0) != MAP_FAILED);
	start(&m);
	CHECK(ioctl(m.vcpu, KVM_RUN, 0) == 0);
	CHECK(ftruncate(file, 0) == 0);
	start(&m);
	FAILS(ioctl(m.vcpu, KVM_RUN, 0), EFAULT);
	CHECK(ftruncate(file, 4096) == 0);
	start(&m);
	CHECK(ioctl(m.vcpu, KVM_RUN, 0) == 0);
	CHECK(m.memory[0x8000] == 0x42);
	return 0;
}
