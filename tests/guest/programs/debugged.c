/* Debug registers as a guest uses them: a child of PTRACE_TRACEME is stopped by hardware watchpoints and single-steps.
 * "anykvm-guest: debugged NAME=0xCOUNT" for each. Then MOV SS in a loop, at an address that is told first, for a debugger
 * outside the guest. */

#include "linux.h"

#define PTRACE_TRACEME 0
#define PTRACE_PEEKUSER 3
#define PTRACE_POKEUSER 6
#define PTRACE_CONT 7
#define PTRACE_SINGLESTEP 9
#define DEBUGREG(n) (848 + (n) * 8) /* offsetof(struct user, u_debugreg) */
#define RIP 128
#define SIGTRAP 5
#define SIGCHLD 17
#define SIGSTOP 19
#define WRITES 10
#define STEPS 20

static volatile u64 watched;

static void child(void)
{
    call(__NR_ptrace, PTRACE_TRACEME, 0, 0, 0, 0, 0);
    call(__NR_kill, call(__NR_getpid, 0, 0, 0, 0, 0, 0), SIGSTOP, 0, 0, 0, 0);
    for (int i = 0; i < WRITES; i++)
        watched = i;
    call(__NR_kill, call(__NR_getpid, 0, 0, 0, 0, 0, 0), SIGSTOP, 0, 0, 0, 0);
    for (int i = 0; i < STEPS; i++)
        asm volatile("nop");
    call(__NR_exit, 0, 0, 0, 0, 0, 0);
}

/* What the child was stopped by; 0 when it has ended. */
static int stopped(long pid)
{
    int status = 0;

    call(__NR_wait4, pid, (long)&status, 0, 0, 0, 0);
    return (status & 0xff) == 0x7f ? status >> 8 & 0xff : 0;
}

static void resume(long pid, int how)
{
    call(__NR_ptrace, how, pid, 0, 0, 0, 0);
}

static u64 peek(long pid, long offset)
{
    u64 value = 0;

    call(__NR_ptrace, PTRACE_PEEKUSER, pid, offset, (long)&value, 0, 0);
    return value;
}

extern char mov_ss[];

static __attribute__((noinline)) void load_ss(void)
{
    asm volatile("mov %%ss, %%eax\n\t"
                 ".globl mov_ss\nmov_ss:\n\tmov %%eax, %%ss\n\tnop\n\tnop" ::: "eax");
}

static int check(void)
{
    int hits = 0, steps = 0, bad = 0;
    long pid;

    say("symbol mov_ss", (u64)mov_ss);
    pid = call(__NR_fork, 0, 0, 0, 0, 0, 0);

    if (pid == 0)
        child();
    if (stopped(pid) != SIGSTOP)
        return wrong("the child did not stop");
    /* DR0: writes of eight bytes. */
    bad += call(__NR_ptrace, PTRACE_POKEUSER, pid, DEBUGREG(0), (long)&watched, 0, 0) != 0;
    bad += call(__NR_ptrace, PTRACE_POKEUSER, pid, DEBUGREG(7), 0x90001, 0, 0) != 0;
    resume(pid, PTRACE_CONT);
    while (stopped(pid) == SIGTRAP) {
        hits += (peek(pid, DEBUGREG(6)) & 15) == 1;
        resume(pid, PTRACE_CONT);
    }
    bad += call(__NR_ptrace, PTRACE_POKEUSER, pid, DEBUGREG(7), 0, 0, 0) != 0;
    for (u64 last = 0, now; steps < 10000; last = now) {
        resume(pid, PTRACE_SINGLESTEP);
        if (stopped(pid) != SIGTRAP)
            break;
        now = peek(pid, RIP);
        steps++;
        bad += now == last;
    }
    say("debugged hits", hits);
    say("debugged steps", steps);
    for (int i = 0; i < 100; i++)
        load_ss();
    if (bad)
        return wrong("ptrace");
    return steps < STEPS;
}
