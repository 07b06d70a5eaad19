/* Kicks in every way a VMM has, against vCPUs in every kind of loop: none is lost, none ends KVM_RUN twice, and no exit
 * is lost or comes twice. The first argument is the number of kicks, divided among all pairs of way and loop. */
#include <semaphore.h>
#include <stdatomic.h>
#include <time.h>
#include "vm.h"

enum way {
	HANDLER,        /* a handler that sets immediate_exit */
	MASK,           /* blocked in the thread, let through by KVM_SET_SIGNAL_MASK, and taken by sigtimedwait */
	BOTH,           /* immediate_exit set by the other thread, then a signal to end a KVM_RUN that has begun */
	IMMEDIATE,      /* immediate_exit alone, which counts at the next entry */
};
static const char *const ways[] = { "handler", "mask", "both", "immediate" };

struct loop {
	const char *name;
	int exits, irqchip;
	const char *code;
	size_t size;
};
#define LOOP(name, exits, irqchip, code) { name, exits, irqchip, code, sizeof(code) - 1 }
static const struct loop loops[] = {
	/* 1: inc ecx; add eax, ecx; jmp 1b */
	LOOP("compute", 0, 0, "\x66\x41\x66\x01\xc8\xeb\xf9"),
	/* 1: hlt; jmp 1b, sleeping in KVM_RUN */
	LOOP("halted", 0, 1, "\xf4\xeb\xfd"),
	/* 1: inc ecx; hlt; jmp 1b, leaving it */
	LOOP("hlt", 1, 0, "\x66\x41\xf4\xeb\xfb"),
	/* 1: out 0x10, eax; inc eax; jmp 1b */
	LOOP("out", 1, 0, "\x66\xe7\x10\x66\x40\xeb\xf9"),
	/* 1: in eax, 0x10; add ecx, eax; jmp 1b */
	LOOP("in", 1, 0, "\x66\xe5\x10\x66\x01\xc1\xeb\xf8"),
	/* mov bx, 0xffff; mov ds, bx; 1: inc eax; mov [0x10], eax; mov ecx, [0x10]; cmp ecx, eax; je 1b; out 0x99, al */
	LOOP("mmio", 1, 0, "\xbb\xff\xff\x8e\xdb\x66\x40\x66\xa3\x10\x00\x66\x8b\x0e\x10\x00\x66\x39\xc1\x74\xf0\xe6\x99"),
	/* mov cx, 4; mov si, 0x1000; cld; rep outsb; jmp back to the start */
	LOOP("rep outs", 1, 0, "\xb9\x04\x00\xbe\x00\x10\xfc\xf3\x6e\xeb\xf5"),
};
#define LOOPS (sizeof(loops) / sizeof(*loops))

static struct vm m;
static enum way way;
static const struct loop *loop;
static pthread_t vcpu_thread;
static long kicks;
static atomic_long asked, sent, handled, answered;
static long interrupts, exits;

static void handler(int signal)
{
	if (way == HANDLER)
		m.run->immediate_exit = 1;
	atomic_fetch_add(&handled, 1);
}

/* One post for each KVM_RUN that was interrupted. */
static sem_t news;

static void wait_for(long number)
{
	while (atomic_load(&answered) < number)
		sem_wait(&news);
}

/* Every other kick waits for the one before; the rest come in crowds, at any moment. */
static void *kick(void *unused)
{
	union sigval value = { .sival_int = 0 };
	unsigned random = 12345;
	for (long i = 1; i <= kicks; i++) {
		random = random * 1103515245 + 12345;
		if (i & 64 || way == BOTH || way == IMMEDIATE)
			wait_for(i - 1);
		else
			wait_for(i - 32);
		for (volatile unsigned delay = random >> (18 + i % 8); delay > 0; delay--)
			;
		atomic_store(&asked, i);
		if (way == BOTH || way == IMMEDIATE)
			m.run->immediate_exit = 1;
		if (way != IMMEDIATE)
			while (pthread_sigqueue(vcpu_thread, SIGRTMIN, value) != 0)
				sched_yield();
		atomic_store(&sent, i);
	}
	return NULL;
}

/* KVM_RUN ended by EINTR: it must have been for a kick. */
static void interrupted(void)
{
	struct timespec now = { 0 };
	sigset_t set;
	long before = atomic_load(&answered), ask;
	interrupts++;
	switch (way) {
	case HANDLER:
		m.run->immediate_exit = 0;
		atomic_thread_fence(memory_order_seq_cst);
		CHECK(atomic_load(&handled) > before);
		atomic_store(&answered, atomic_load(&handled));
		break;
	case MASK:
		sigemptyset(&set);
		sigaddset(&set, SIGRTMIN);
		CHECK(sigtimedwait(&set, NULL, &now) == SIGRTMIN);
		atomic_store(&answered, before + 1);
		break;
	case BOTH:
	case IMMEDIATE:
		m.run->immediate_exit = 0;
		atomic_thread_fence(memory_order_seq_cst);
		ask = atomic_load(&asked);
		/* The signal may find a KVM_RUN that immediate_exit did not end any more. */
		CHECK(ask > before || (way == BOTH && interrupts <= 2 * ask));
		atomic_store(&answered, ask);
		break;
	}
	sem_post(&news);
}

static uint32_t value, sum;

/* Any other end of KVM_RUN: the one that the loop makes next. */
static void exited(void)
{
	uint8_t *data = (uint8_t *)m.run + m.run->io.data_offset;
	exits++;
	if (!strcmp(loop->name, "hlt")) {
		CHECK(m.run->exit_reason == KVM_EXIT_HLT);
	} else if (!strcmp(loop->name, "mmio")) {
		CHECK(m.run->exit_reason == KVM_EXIT_MMIO);
		CHECK(m.run->mmio.phys_addr == 0xffff0 + 0x10 && m.run->mmio.len == 4);
		CHECK(m.run->mmio.is_write == exits % 2);
		if (m.run->mmio.is_write) {
			value++;
			CHECK(memcmp(m.run->mmio.data, &value, 4) == 0);
		} else {
			memcpy(m.run->mmio.data, &value, 4);
		}
	} else if (!strcmp(loop->name, "rep outs")) {
		CHECK(m.run->exit_reason == KVM_EXIT_IO && m.run->io.port == 0x10);
		for (unsigned i = 0; i < m.run->io.count; i++)
			CHECK(data[i] == 0xa0 + value++ % 4);
	} else {
		CHECK(m.run->exit_reason == KVM_EXIT_IO && m.run->io.port == 0x10);
		CHECK(m.run->io.size == 4 && m.run->io.count == 1);
		if (m.run->io.direction == KVM_EXIT_IO_OUT) {
			CHECK(memcmp(data, &value, 4) == 0);
			value++;
		} else {
			value = value * 5 + 1;
			sum += value;
			memcpy(data, &value, 4);
		}
	}
}

static void start(void)
{
	struct kvm_userspace_memory_region region = { .memory_size = 65536 };
	struct kvm_regs regs = { .rflags = 2, .rdx = 0x10 };
	struct kvm_sregs sregs;

	CHECK((m.vm = ioctl(m.kvm, KVM_CREATE_VM, 0)) >= 0);
	if (loop->irqchip)
		CHECK(ioctl(m.vm, KVM_CREATE_IRQCHIP, 0) == 0);
	memset(m.memory, 0, 65536);
	memcpy(m.memory, loop->code, loop->size);
	memcpy(m.memory + 0x1000, "\xa0\xa1\xa2\xa3", 4);
	region.userspace_addr = (uintptr_t)m.memory;
	CHECK(ioctl(m.vm, KVM_SET_USER_MEMORY_REGION, &region) == 0);
	CHECK((m.vcpu = ioctl(m.vm, KVM_CREATE_VCPU, 0)) >= 0);
	m.run = mmap(NULL, 12288, PROT_READ | PROT_WRITE, MAP_SHARED, m.vcpu, 0);
	CHECK(m.run != MAP_FAILED);
	CHECK(ioctl(m.vcpu, KVM_GET_SREGS, &sregs) == 0);
	sregs.cs.base = sregs.cs.selector = 0;
	CHECK(ioctl(m.vcpu, KVM_SET_SREGS, &sregs) == 0);
	CHECK(ioctl(m.vcpu, KVM_SET_REGS, &regs) == 0);
	if (way == MASK) {
		struct {
			struct kvm_signal_mask head;
			uint64_t set;
		} __attribute__((packed)) mask = { .head.len = 8 };
		CHECK(ioctl(m.vcpu, KVM_SET_SIGNAL_MASK, &mask) == 0);
	}
}

/* What the guest has counted is what was seen. */
static void compare(void)
{
	struct kvm_regs regs;
	struct kvm_vcpu_events events;

	/* Completes the last exit. */
	m.run->immediate_exit = 1;
	FAILS(ioctl(m.vcpu, KVM_RUN, 0), EINTR);
	CHECK(ioctl(m.vcpu, KVM_GET_REGS, &regs) == 0);
	CHECK(ioctl(m.vcpu, KVM_GET_VCPU_EVENTS, &events) == 0);
	CHECK(!events.exception.injected && !events.triple_fault.pending);
	if (!strcmp(loop->name, "compute")) {
		uint64_t n = (uint32_t)regs.rcx;
		uint32_t all = n * (n + 1) / 2;
		if (regs.rip == 2)
			all -= n;
		CHECK((uint32_t)regs.rax == all);
	} else if (!strcmp(loop->name, "hlt")) {
		CHECK(regs.rcx == exits || (regs.rcx == exits + 1 && regs.rip == 2));
	} else if (!strcmp(loop->name, "out")) {
		CHECK(regs.rax == value || (regs.rax == value - 1 && regs.rip == 3));
	} else if (!strcmp(loop->name, "in")) {
		if (regs.rip == 3)
			regs.rcx += regs.rax;
		CHECK((uint32_t)regs.rcx == sum);
	} else if (!strcmp(loop->name, "mmio")) {
		CHECK((uint32_t)regs.rax - value <= 1);
	}
}

static void stress(void)
{
	pthread_t other;
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN);
	CHECK(pthread_sigmask(way == MASK ? SIG_BLOCK : SIG_UNBLOCK, &set, NULL) == 0);
	CHECK(sem_init(&news, 0, 0) == 0);
	asked = sent = handled = answered = 0;
	interrupts = exits = value = sum = 0;
	start();
	CHECK(pthread_create(&other, NULL, kick, NULL) == 0);
	while (atomic_load(&answered) < kicks) {
		if (ioctl(m.vcpu, KVM_RUN, 0) == 0) {
			exited();
			continue;
		}
		CHECK(errno == EINTR);
		interrupted();
	}
	CHECK(pthread_join(other, NULL) == 0);
	/* The last signal of BOTH may still come. */
	CHECK(way == MASK || way == IMMEDIATE || atomic_load(&handled) == kicks);
	CHECK(way == MASK ? interrupts == kicks : interrupts <= (way == BOTH ? 2 : 1) * kicks);
	compare();
	printf("%-9s %-8s %7ld kicks, %7ld times EINTR, %8ld exits\n", ways[way], loop->name, kicks, interrupts,
	       exits);
	CHECK(munmap(m.run, 12288) == 0);
	CHECK(close(m.vcpu) == 0 && close(m.vm) == 0);
}

int main(int argc, char **argv)
{
	struct sigaction action = { .sa_handler = handler };
	long all = argc > 1 ? atol(argv[1]) : 20000;
	int pairs = 0;

	setvbuf(stdout, NULL, _IOLBF, 0);
	vcpu_thread = pthread_self();
	CHECK((m.kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC)) >= 0);
	m.memory = mmap(NULL, 65536, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(m.memory != MAP_FAILED);
	CHECK(sigaction(SIGRTMIN, &action, NULL) == 0);
	for (int pass = 0; pass < 2; pass++) {
		for (way = HANDLER; way <= IMMEDIATE; way++) {
			for (size_t i = 0; i < LOOPS; i++) {
				loop = &loops[i];
				/* Without a signal only a KVM_RUN that ends by itself looks again. */
				if (way == IMMEDIATE && !loop->exits)
					continue;
				if (pass == 0)
					pairs++;
				else
					stress();
			}
		}
		kicks = (all + pairs - 1) / pairs;
	}
	return 0;
}
