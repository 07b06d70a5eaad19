/* The cost of reading and writing a vCPU's state, through the ioctls of an unmodified program: what a monitor does on
 * every exit that it looks at, and to save and restore. Prints nanoseconds, the fastest of many rounds. */
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>

#define NEED(condition)                                                       \
	do {                                                                  \
		if (!(condition)) {                                           \
			perror(#condition);                                   \
			exit(1);                                              \
		}                                                             \
	} while (0)

#define ROUNDS 60
#define TURNS 200

static int vcpu;
static struct kvm_regs regs;
static struct kvm_sregs sregs;
static struct kvm_sregs2 sregs2;
static struct kvm_debugregs debugregs;
static struct kvm_vcpu_events events;
static struct kvm_xcrs xcrs;
static struct kvm_mp_state mp_state;
static struct kvm_lapic_state lapic;
static struct kvm_msrs *msrs;
static void *xsave;
static int count;
static struct kvm_run *run;

static void look(void)
{
	NEED(ioctl(vcpu, KVM_GET_REGS, &regs) == 0);
	NEED(ioctl(vcpu, KVM_GET_SREGS, &sregs) == 0);
	NEED(ioctl(vcpu, KVM_GET_DEBUGREGS, &debugregs) == 0);
	NEED(ioctl(vcpu, KVM_GET_VCPU_EVENTS, &events) == 0);
}

static void read_msrs(void)
{
	NEED(ioctl(vcpu, KVM_GET_MSRS, msrs) == count);
}

static void write_msrs(void)
{
	NEED(ioctl(vcpu, KVM_SET_MSRS, msrs) == count);
}

static void read_xsave(void)
{
	NEED(ioctl(vcpu, KVM_GET_XSAVE2, xsave) == 0);
}

static void write_xsave(void)
{
	NEED(ioctl(vcpu, KVM_SET_XSAVE, xsave) == 0);
}

static void read_lapic(void)
{
	NEED(ioctl(vcpu, KVM_GET_LAPIC, &lapic) == 0);
}

static void write_lapic(void)
{
	NEED(ioctl(vcpu, KVM_SET_LAPIC, &lapic) == 0);
}

static void save(void)
{
	NEED(ioctl(vcpu, KVM_GET_MP_STATE, &mp_state) == 0);
	NEED(ioctl(vcpu, KVM_GET_REGS, &regs) == 0);
	read_xsave();
	NEED(ioctl(vcpu, KVM_GET_XCRS, &xcrs) == 0);
	NEED(ioctl(vcpu, KVM_GET_SREGS2, &sregs2) == 0);
	read_msrs();
	read_lapic();
	NEED(ioctl(vcpu, KVM_GET_VCPU_EVENTS, &events) == 0);
	NEED(ioctl(vcpu, KVM_GET_DEBUGREGS, &debugregs) == 0);
}

static void restore(void)
{
	NEED(ioctl(vcpu, KVM_SET_SREGS2, &sregs2) == 0);
	NEED(ioctl(vcpu, KVM_SET_REGS, &regs) == 0);
	NEED(ioctl(vcpu, KVM_SET_XCRS, &xcrs) == 0);
	write_xsave();
	write_msrs();
	write_lapic();
	NEED(ioctl(vcpu, KVM_SET_VCPU_EVENTS, &events) == 0);
	NEED(ioctl(vcpu, KVM_SET_MP_STATE, &mp_state) == 0);
	NEED(ioctl(vcpu, KVM_SET_DEBUGREGS, &debugregs) == 0);
}

/* One turn of a guest's loop that writes to a port. */
static void leave(void)
{
	NEED(ioctl(vcpu, KVM_RUN, 0) == 0 && run->exit_reason == KVM_EXIT_IO);
}

static void leave_and_look(void)
{
	leave();
	look();
}

static void leave_save_and_restore(void)
{
	leave();
	save();
	restore();
}

static void both(void)
{
	save();
	restore();
}

/* Memory, and the vCPU in front of its loop. */
static void start(int vm)
{
	static uint8_t memory[8192] __attribute__((aligned(4096)));
	struct kvm_userspace_memory_region region = {
		.memory_size = sizeof(memory), .userspace_addr = (uintptr_t)memory,
	};
	/* out 0x10, al; jmp back */
	memcpy(memory + 0x1000, "\xe6\x10\xeb\xfc", 4);
	NEED(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) == 0);
	run = mmap(NULL, 12288, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	NEED(run != MAP_FAILED);
	NEED(ioctl(vcpu, KVM_GET_SREGS, &sregs) == 0);
	sregs.cs.base = sregs.cs.selector = 0;
	NEED(ioctl(vcpu, KVM_SET_SREGS, &sregs) == 0);
	regs.rip = 0x1000;
	regs.rflags = 2;
	NEED(ioctl(vcpu, KVM_SET_REGS, &regs) == 0);
}

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e9 + t.tv_nsec;
}

static void measure(const char *name, void (*call)(void))
{
	double least = 1e18;
	for (int round = 0; round < ROUNDS; round++) {
		double start = now();
		for (int turn = 0; turn < TURNS; turn++)
			call();
		double time = (now() - start) / TURNS;
		if (time < least)
			least = time;
	}
	printf("%-32s %10.1f\n", name, least);
}

int main(void)
{
	int kvm, vm, size;
	struct kvm_msr_list *list = malloc(sizeof(*list) + 1024 * 4);
	struct {
		struct kvm_cpuid2 head;
		struct kvm_cpuid_entry2 entries[256];
	} *cpuid = malloc(sizeof(*cpuid));

	NEED((kvm = open("/dev/kvm", O_RDWR)) >= 0);
	NEED((vm = ioctl(kvm, KVM_CREATE_VM, 0)) >= 0);
	NEED(ioctl(vm, KVM_CREATE_IRQCHIP, 0) == 0);
	NEED((vcpu = ioctl(vm, KVM_CREATE_VCPU, 0)) >= 0);
	start(vm);
	cpuid->head.nent = 256;
	NEED(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, cpuid) == 0);
	NEED(ioctl(vcpu, KVM_SET_CPUID2, cpuid) == 0);
	NEED((size = ioctl(vm, KVM_CHECK_EXTENSION, KVM_CAP_XSAVE2)) >= 4096);
	xsave = calloc(1, size);
	list->nmsrs = 1024;
	NEED(ioctl(kvm, KVM_GET_MSR_INDEX_LIST, list) == 0);
	msrs = calloc(1, sizeof(*msrs) + list->nmsrs * sizeof(struct kvm_msr_entry));
	/* Those that this vCPU has, and that take back what they gave. */
	for (unsigned i = 0; i < list->nmsrs; i++) {
		msrs->nmsrs = count + 1;
		msrs->entries[count].index = list->indices[i];
		if (ioctl(vcpu, KVM_GET_MSRS, msrs) == count + 1 && ioctl(vcpu, KVM_SET_MSRS, msrs) == count + 1)
			count++;
	}
	msrs->nmsrs = count;
	setvbuf(stdout, NULL, _IOLBF, 0);
	printf("%-32s %10s\n", "state", "ns");
	measure("get REGS+SREGS+DEBUGREGS+EVENTS", look);
	measure("exit", leave);
	measure("exit, and these", leave_and_look);
	measure("exit, save and restore", leave_save_and_restore);
	measure("save and restore", both);
	measure("  save", save);
	measure("  restore", restore);
	measure("  get XSAVE2", read_xsave);
	measure("  set XSAVE", write_xsave);
	printf("  (%d of %u MSRs)\n", count, list->nmsrs);
	measure("  get MSRS", read_msrs);
	measure("  set MSRS", write_msrs);
	measure("  get LAPIC", read_lapic);
	measure("  set LAPIC", write_lapic);
	return 0;
}
