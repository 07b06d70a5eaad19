/* Addresses of 57 bits in user space (SDM Vol. 3A, 4.5; Linux, Documentation/x86/x86_64/5level-paging.rst):
 * memory above 2^47, which a program gets only by asking for it, in every 2^48 bytes of user space. */

#include "linux.h"

#define PAGE 4096ul
#define PROT_READ_WRITE 3
#define MAP_PRIVATE_ANONYMOUS 0x22
#define MAP_FIXED_NOREPLACE 0x100000
#define SIGSEGV 11
#define SA_SIGINFO 4
#define SA_RESTORER 0x04000000
#define REG_RIP 16

/* struct kernel_sigaction, asm/signal.h */
struct action {
    void (*handler)(int, void *, void *);
    unsigned long flags;
    void (*restorer)(void);
    unsigned long mask;
};

static volatile unsigned faults;
static void *volatile fault_address;

void restore(void);
asm("restore: mov $15, %eax\n syscall\n"); /* rt_sigreturn */

/* Every access that may fault is one MOV of three bytes, which is left out. */
static void on_fault(int signal, void *info, void *context)
{
    unsigned long *registers = (unsigned long *)((char *)context + 40);

    (void)signal;
    faults++;
    fault_address = *(void **)((char *)info + 16);
    registers[REG_RIP] += 3;
}

static u64 load(u64 address)
{
    u64 value = 0;

    asm volatile("mov (%1), %0" : "+a"(value) : "d"(address) : "memory");
    return value;
}

static u64 map(u64 address, long flags)
{
    return call(__NR_mmap, address, PAGE, PROT_READ_WRITE, MAP_PRIVATE_ANONYMOUS | flags, -1, 0);
}

/* One page in each 256 TiB, that is behind every entry of the top-level table's user half. */
static int everywhere(void)
{
    u64 top;

    for (top = 0; top < 256; top++) {
        u64 address = (top << 48) + 0x7654321000;

        if (map(address, MAP_FIXED_NOREPLACE) != address)
            return wrong("no memory where it was wanted");
        *(volatile u64 *)(address + 8) = address ^ 0x5a5a;
    }
    for (top = 0; top < 256; top++) {
        u64 address = (top << 48) + 0x7654321000;

        if (load(address + 8) != (address ^ 0x5a5a))
            return wrong("memory holds something else");
        /* The same address but for bits that only five levels look at */
        if (load(address + 16) != 0)
            return wrong("new memory is not empty");
    }
    return 0;
}

/* Loads that fault and the address that the kernel tells: CR2's for #PF, none for the #GP of an address that
 * is not canonical. */
static int refused(void)
{
    static const struct {
        u64 address, told;
    } cases[] = {
        {0x00ffffffffff0000, 0x00ffffffffff0000}, /* user space, nothing there */
        {0x00fedcba98765000, 0x00fedcba98765000},
        {0xff11000000000000, 0xff11000000000000}, /* the kernel's direct map */
        {0xff00000000000000, 0xff00000000000000}, /* the lowest canonical address of the upper half */
        {0x0100000000000000, 0}, /* not canonical */
        {0xfeffffffffffffff, 0},
        {0x8000000000000000, 0},
    };
    struct action action = {on_fault, SA_SIGINFO | SA_RESTORER, restore, 0};
    unsigned i;

    call(__NR_rt_sigaction, SIGSEGV, (long)&action, 0, 8, 0, 0);
    for (i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        fault_address = (void *)1;
        load(cases[i].address);
        if (faults != i + 1)
            return wrong("a load did not fault");
        if ((u64)fault_address != cases[i].told) {
            say("told", (u64)fault_address);
            return wrong("another address is told");
        }
    }
    return 0;
}

static int check(void)
{
    u64 high = map(1ul << 55, 0);
    u64 low = map(0, 0);

    say("mmap high", high);
    say("mmap low", low);
    if (high != 1ul << 55 || low >> 47)
        return 1;
    return everywhere() + refused();
}
