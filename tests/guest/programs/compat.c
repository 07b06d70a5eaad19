/* A 32-bit program under a 64-bit kernel: compatibility mode (SDM Vol. 1, 3.1; APM Vol. 1, 1.2.2). System calls
 * by INT 80h and by the vDSO, which uses SYSENTER on Intel's processors and SYSCALL on AMD's; faults and
 * signals; segments with bases and limits in the GDT and in an LDT; instructions that 64-bit mode has not. */

#include "linux.h"

#define SIGSEGV 11
#define SIGTRAP 5
#define SIGUSR1 10
#define SA_SIGINFO 4
#define SA_RESTORER 0x04000000
#define SA_NODEFER 0x40000000
/* struct sigcontext_32 in ucontext_ia32, in words from its start */
#define UC_GS 5
#define UC_EIP 19
#define UC_EFLAGS 21

struct action {
    void (*handler)(int, void *, u32 *);
    u32 flags;
    void (*restorer)(void);
    u32 mask[2];
};

/* struct user_desc, asm/ldt.h */
struct segment {
    u32 number, base, limit, flags;
};
#define SEG_32BIT 1

static volatile u32 signals, last_signal, skip;

void restore(void);
asm("restore: mov $173, %eax\n int $0x80\n"); /* rt_sigreturn */

static void on_signal(int signal, void *info, u32 *context)
{
    (void)info;
    signals++;
    last_signal = signal;
    context[UC_EIP] += skip;
    context[UC_EFLAGS] &= ~0x100;
}

static void catch(int signal)
{
    struct action action = {on_signal, SA_SIGINFO | SA_RESTORER | SA_NODEFER, restore, {0, 0}};

    call(__NR_rt_sigaction, signal, (long)&action, 0, 8, 0, 0);
}

/* The vDSO's entry. */
#define AT_SYSINFO 32
static u32 vsyscall;

static int entries(void)
{
    u32 pid = call(__NR_getpid, 0, 0, 0, 0, 0, 0);
    u32 got, i;

    if (!vsyscall)
        return wrong("no AT_SYSINFO");
    for (i = 0; i < 1000; i++) {
        asm volatile("call *%1" : "=a"(got) : "m"(vsyscall), "a"(__NR_getpid) : "memory");
        if (got != pid)
            return wrong("getpid by the vDSO");
    }
    /* mmap2 with six arguments, the last in EBP: 64 KiB of nothing at a place of the kernel's choice */
    asm volatile("push %%ebp; mov $0, %%ebp; call *%[entry]; pop %%ebp"
                 : "=a"(got)
                 : "S"(0x22), "a"(__NR_mmap2), "b"(0), "c"(0x10000), "d"(3), "D"(-1), [entry] "m"(vsyscall)
                 : "memory");
    if (got > 0xfffff000u)
        return wrong("mmap by the vDSO");
    *(volatile u32 *)(got + 0xfffc) = 6;
    return 0;
}

static int faults_and_signals(void)
{
    u32 i, value = 7;

    catch(SIGSEGV);
    catch(SIGTRAP);
    catch(SIGUSR1);
    skip = 2; /* mov (%edx), %eax */
    asm volatile("mov (%1), %0" : "+a"(value) : "d"(16) : "memory");
    if (signals != 1 || last_signal != SIGSEGV || value != 7)
        return wrong("a fault");
    /* the top of 32-bit space is not the program's; the address wraps at 4 GiB */
    asm volatile("mov (%1), %0" : "+a"(value) : "d"(0xfffffff0) : "memory");
    if (signals != 2)
        return wrong("a fault at the top");
    skip = 0;
    asm volatile("int3");
    if (signals != 3 || last_signal != SIGTRAP)
        return wrong("int3");
    asm volatile("pushf; orl $0x100, (%%esp); popf; nop" ::: "memory", "cc");
    if (signals != 4)
        return wrong("the trap flag");
    for (i = 0; i < 100; i++)
        call(__NR_kill, call(__NR_getpid, 0, 0, 0, 0, 0, 0), SIGUSR1, 0, 0, 0, 0);
    if (signals != 104)
        return wrong("signals to oneself");
    return 0;
}

static u32 words[1024];

static u32 through_fs(u32 selector, u32 offset)
{
    u32 value = 0;

    asm volatile("push %%fs; mov %1, %%fs; mov %%fs:(%2), %0; pop %%fs"
                 : "+a"(value)
                 : "c"(selector), "d"(offset));
    return value;
}

static int segments(void)
{
    struct segment tls = {-1, (u32)words, 4095, SEG_32BIT};
    struct segment ldt = {3, (u32)words + 64, 63, SEG_32BIT};
    u32 i, selector;

    for (i = 0; i < 1024; i++)
        words[i] = i * 0x01010101;
    if (call(__NR_set_thread_area, (long)&tls, 0, 0, 0, 0, 0) != 0)
        return wrong("set_thread_area");
    selector = tls.number << 3 | 3;
    if (through_fs(selector, 400) != words[100])
        return wrong("a segment in the GDT");
    if (call(__NR_modify_ldt, 0x11, (long)&ldt, sizeof(ldt), 0, 0, 0) != 0)
        return wrong("modify_ldt");
    selector = 3 << 3 | 7;
    if (through_fs(selector, 60) != words[16 + 15])
        return wrong("a segment in the LDT");
    /* 64 is behind its limit: the load faults, and the handler leaves out `mov %fs:(%edx), %eax` */
    i = signals;
    skip = 3;
    through_fs(selector, 61);
    if (signals != i + 1 || last_signal != SIGSEGV)
        return wrong("the limit of a segment");
    return 0;
}

/* Instructions that 64-bit mode has not, or has otherwise. */
static int instructions(void)
{
    u32 value, stack, after;
    u32 bounds[2] = {1, 9};

    asm volatile("mov $0x79, %%eax; add $0x35, %%al; daa" : "=&a"(value) : : "cc");
    if ((value & 0xff) != 0x14)
        return wrong("daa");
    asm volatile("mov $0x0203, %%eax; aad; " : "=&a"(value) : : "cc");
    if ((value & 0xffff) != 23)
        return wrong("aad");
    asm volatile("mov $0x7fffffff, %%eax; inc %%eax; .byte 0x0f, 0x90, 0xc0" : "=&a"(value) : : "cc");
    if ((value & 0xff) != 1)
        return wrong("inc");
    asm volatile("mov %%esp, %1; pusha; popa; mov %%esp, %2; bound %0, %3"
                 : "=&a"(value), "=&r"(stack), "=&r"(after)
                 : "m"(bounds), "0"(5)
                 : "memory");
    if (stack != after)
        return wrong("pusha and popa");
    asm volatile("push %%cs; push $1f; lret; mov $0, %0; 1:" : "+r"(value) : : "memory");
    if (!value)
        return wrong("a far return");
    return 0;
}

static int check(void)
{
    unsigned long *at = initial_stack + 1 + *initial_stack + 1;

    while (*at)
        at++;
    for (at++; *at; at += 2)
        if (*at == AT_SYSINFO)
            vsyscall = at[1];
    return entries() + faults_and_signals() + segments() + instructions();
}
