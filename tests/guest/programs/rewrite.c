/* A program that makes code, runs it, and changes it, in the ways just-in-time compilers do: by a second
 * mapping, by mprotect, in new memory at old addresses, by code that changes itself, and in several threads
 * that work in the same pages. What each function returns is known. "anykvm-guest: rewrite NAME=0xCOUNT" for
 * each part; "wrong" lines otherwise. */

#include "linux.h"

#define PROT_READ 1
#define PROT_WRITE 2
#define PROT_EXEC 4
#define MAP_SHARED 1
#define MAP_PRIVATE_ANONYMOUS 0x22
#define MAP_FIXED 0x10
#define SIGCHLD 17
#define CLONE_VM 0x100
#define WAIT_ALL 0x40000000 /* __WALL */

#define PAGE 4096ul
#define PAGES 16
#define SLOTS (PAGES * (PAGE / 256))

typedef u32 function(u32);

static u8 *map(void *at, u64 length, int protection, int flags, int fd)
{
    return (u8 *)call(__NR_mmap, (long)at, length, protection, flags, fd, 0);
}

static u32 next(u64 *state)
{
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return (*state * 0x2545f4914f6cdd1dull) >> 32;
}

static u8 *put32(u8 *at, u32 value)
{
    __builtin_memcpy(at, &value, 4);
    return at + 4;
}

/* Writes one of several functions with a number in it; returns its length. */
static unsigned make(u8 *at, unsigned kind, u32 n)
{
    u8 *p = at;

    switch (kind) {
    case 0: /* mov eax, n; xor eax, edi; ret */
        *p++ = 0xb8;
        p = put32(p, n);
        *p++ = 0x31;
        *p++ = 0xf8;
        break;
    case 1: /* lea eax, [rdi + n]; ret */
        *p++ = 0x8d;
        *p++ = 0x87;
        p = put32(p, n);
        break;
    case 2: /* mov ecx, 5; xor eax, eax; add eax, n; add eax, edi; dec ecx; jne; ret */
        *p++ = 0xb9;
        p = put32(p, 5);
        *p++ = 0x31;
        *p++ = 0xc0;
        *p++ = 0x05;
        p = put32(p, n);
        *p++ = 0x01;
        *p++ = 0xf8;
        *p++ = 0xff;
        *p++ = 0xc9;
        *p++ = 0x75;
        *p++ = 0xf5;
        break;
    default: /* test edi, 1; mov eax, n; je over; not eax; over: ret */
        *p++ = 0xf7;
        *p++ = 0xc7;
        p = put32(p, 1);
        *p++ = 0xb8;
        p = put32(p, n);
        *p++ = 0x74;
        *p++ = 0x02;
        *p++ = 0xf7;
        *p++ = 0xd0;
        break;
    }
    *p++ = 0xc3;
    return p - at;
}

static u32 expected(unsigned kind, u32 n, u32 argument)
{
    switch (kind) {
    case 0:
        return n ^ argument;
    case 1:
        return n + argument;
    case 2:
        return 5 * (n + argument);
    default:
        return argument & 1 ? ~n : n;
    }
}

static int verify(const u8 *code, unsigned kind, u32 n, u32 times)
{
    u32 i;

    for (i = 0; i < times; i++)
        if (((function *)code)(i * 77) != expected(kind, n, i * 77))
            return 1;
    return 0;
}

/* Written at one address, run at another. Functions lie at any offset, some across the pages' boundaries. */
static int two_mappings(u8 *writable, const u8 *executable, u64 seed, u32 rounds)
{
    u32 i;

    for (i = 0; i < rounds; i++) {
        u32 offset = next(&seed) % (PAGES * PAGE - 64), n = next(&seed);
        unsigned kind = next(&seed) & 3;

        make(writable + offset, kind, n);
        if (verify(executable + offset, kind, n, i % 16 == 0 ? 40 : 3))
            return wrong("code written by another mapping");
    }
    return 0;
}

/* Only the number in a function that is hot, at every alignment. */
static int numbers(u8 *writable, const u8 *executable, u64 seed, u32 rounds)
{
    u32 i, offset = 0;

    for (i = 0; i < rounds; i++) {
        u32 n = next(&seed);

        if (i % 64 == 0) {
            offset = next(&seed) % (PAGES * PAGE - 64);
            make(writable + offset, 0, n);
            if (verify(executable + offset, 0, n, 100))
                return wrong("a function");
        }
        put32(writable + offset + 1, n);
        if (verify(executable + offset, 0, n, 2))
            return wrong("a number replaced in code");
    }
    return 0;
}

/* Writable and executable by turns. */
static int by_mprotect(u64 seed, u32 rounds)
{
    u8 *code = map(0, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE_ANONYMOUS, -1);
    u32 i;

    for (i = 0; i < rounds; i++) {
        u32 n = next(&seed), offset = next(&seed) % 64;

        make(code + offset, i & 3, n);
        call(__NR_mprotect, (long)code, PAGE, PROT_READ | PROT_EXEC, 0, 0, 0);
        if (verify(code + offset, i & 3, n, 20))
            return wrong("code between two calls of mprotect");
        call(__NR_mprotect, (long)code, PAGE, PROT_READ | PROT_WRITE, 0, 0, 0);
    }
    return 0;
}

/* New memory at the address of old code. */
static int by_mmap(u64 seed, u32 rounds)
{
    u8 *code = map(0, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE_ANONYMOUS, -1);
    u32 i;

    for (i = 0; i < rounds; i++) {
        u32 n = next(&seed);

        map(code, 2 * PAGE, PROT_READ | PROT_WRITE | PROT_EXEC,
            MAP_PRIVATE_ANONYMOUS | MAP_FIXED, -1);
        make(code + PAGE - 4, i & 3, n);
        if (verify(code + PAGE - 4, i & 3, n, 20))
            return wrong("code in new memory");
    }
    return 0;
}

/* mov [rip + 2], edi; mov eax, 0; ret: the store replaces the number of the next instruction. */
static int in_itself(u8 *both, u32 rounds)
{
    static const u8 code[] = {0x89, 0x3d, 1, 0, 0, 0, 0xb8, 0, 0, 0, 0, 0xc3};
    u32 i, offset;

    for (offset = 0; offset < 64; offset += 7) {
        __builtin_memcpy(both + PAGE - 32 + offset, code, sizeof(code));
        for (i = 0; i < rounds; i++)
            if (((function *)(both + PAGE - 32 + offset))(i) != i)
                return wrong("code that changes its next instruction");
    }
    return 0;
}

/* What threads share. */
static u8 *shared_writable, *shared_executable;
static volatile u32 published, taken, failed, done;
#define PUBLISHED 2000

/* mov eax, n; ret in eight bytes that one store replaces. */
static u64 word(u32 n)
{
    return 0xb8 | (u64)n << 8 | 0xc3ull << 40 | 0x9090ull << 48;
}

static void serialise(void)
{
    u32 a = 0, b, c = 0, d;

    asm volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d) : : "memory");
}

/* The other thread: runs what the first publishes. First behind a serialising instruction, where only the
 * new code is right; then without, where each call must find some code that was there, and never an older
 * one than before. */
static void other(void)
{
    function *f = (function *)shared_executable;
    u32 seen = 0, last = 0;

    while (seen < PUBLISHED) {
        if (published == seen)
            continue;
        seen++;
        serialise();
        if (f(0) != seen * 3)
            failed = 1;
        taken = seen;
    }
    while (!done) {
        u32 now = f(0);

        if (now < last || now > 3 * PUBLISHED + 100000)
            failed = 2;
        last = now;
    }
    /* And its own functions in the pages that the first works in, too. */
    if (two_mappings(shared_writable + PAGES * PAGE, shared_executable + PAGES * PAGE, 77, 5000))
        failed = 3;
    taken = 0;
}

/* Functions of two threads side by side in the same pages: even slots and odd ones. */
static int slots(unsigned first, u64 seed, u32 rounds)
{
    u32 i;

    for (i = 0; i < rounds; i++) {
        u32 slot = (next(&seed) % (SLOTS / 2)) * 2 + first, n = next(&seed);
        unsigned kind = next(&seed) & 3;

        make(shared_writable + slot * 256, kind, n);
        if (verify(shared_executable + slot * 256, kind, n, 4))
            return 1;
    }
    return 0;
}

static void neighbour(void)
{
    if (slots(1, 5, 20000))
        failed = 4;
}

static long start(void (*run)(void), u8 *stack)
{
    long result;
    void **top = (void **)stack - 2;

    top[0] = run;
    asm volatile("mov %%rsp, %%r12\n"
                 "syscall\n"
                 "test %%rax, %%rax\n"
                 "jnz 1f\n"
                 "pop %%rax\n"
                 "call *%%rax\n"
                 "mov %[leave], %%eax\n"
                 "xor %%edi, %%edi\n"
                 "syscall\n"
                 "1:"
                 : "=a"(result)
                 : "a"((long)__NR_clone), "D"((long)(CLONE_VM | SIGCHLD)), "S"(top), "d"(0l),
                   [leave] "i"(__NR_exit)
                 : "rcx", "r8", "r9", "r10", "r11", "r12", "memory");
    return result;
}

static int threads(void)
{
    u8 *stacks = map(0, 32 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE_ANONYMOUS, -1);
    u64 *target = (u64 *)shared_writable;
    u32 i;

    *target = word(0);
    start(other, stacks + 16 * PAGE);
    for (i = 1; i <= PUBLISHED; i++) {
        __atomic_store_n(target, word(i * 3), __ATOMIC_RELEASE);
        published = i;
        while (taken != i && !failed)
            ;
    }
    for (i = 0; i < 50000; i++)
        __atomic_store_n(target, word(3 * PUBLISHED + i), __ATOMIC_RELEASE);
    done = 1;
    call(__NR_wait4, -1, 0, WAIT_ALL, 0, 0, 0);
    start(neighbour, stacks + 32 * PAGE);
    if (slots(0, 9, 20000))
        failed = 5;
    call(__NR_wait4, -1, 0, WAIT_ALL, 0, 0, 0);
    if (failed) {
        say("rewrite failed", failed);
        return wrong("code of two threads");
    }
    return 0;
}

static int check(void)
{
    int fd = call(__NR_memfd_create, (long)"code", 0, 0, 0, 0, 0);
    u64 length = 2 * PAGES * PAGE;
    int bad = 0;
    u8 *both;

    call(__NR_ftruncate, fd, length, 0, 0, 0, 0);
    shared_writable = map(0, length, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
    shared_executable = map(0, length, PROT_READ | PROT_EXEC, MAP_SHARED, fd);
    both = map(0, length, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE_ANONYMOUS, -1);
    bad += two_mappings(shared_writable, shared_executable, 1, 40000);
    say("rewrite mappings", 40000);
    bad += numbers(shared_writable, shared_executable, 2, 40000);
    say("rewrite numbers", 40000);
    bad += by_mprotect(3, 5000);
    say("rewrite mprotect", 5000);
    bad += by_mmap(4, 2000);
    say("rewrite mmap", 2000);
    bad += in_itself(both, 2000);
    say("rewrite itself", 2000);
    bad += threads();
    say("rewrite bad", bad);
    return bad;
}
