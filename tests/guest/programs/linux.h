/* Linux system calls without a C library, for programs of 64 and of 32 bits: INT 80h in the latter. Numbers
 * come from the kernel's headers. A program has `int check(void)`, which gives its exit status. */

#include <asm/unistd.h>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifdef __x86_64__
static long call(long number, long a, long b, long c, long d, long e, long f)
{
    register long r10 asm("r10") = d, r8 asm("r8") = e, r9 asm("r9") = f;
    long result;

    asm volatile("syscall"
                 : "=a"(result)
                 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                 : "rcx", "r11", "memory");
    return result;
}
#else
static long call(long number, long a, long b, long c, long d, long e, long f)
{
    long result;
    long last[2] = {f, number};

    /* The sixth argument is EBP, which a frame may occupy. */
    asm volatile("push %%ebp; mov (%%eax), %%ebp; mov 4(%%eax), %%eax; int $0x80; pop %%ebp"
                 : "=a"(result)
                 : "a"(last), "b"(a), "c"(b), "d"(c), "S"(d), "D"(e)
                 : "memory");
    return result;
}
#endif

static unsigned length(const char *text)
{
    unsigned count = 0;

    while (text[count])
        count++;
    return count;
}

static void print(const char *text)
{
    call(__NR_write, 1, (long)text, length(text), 0, 0, 0);
}

/* "anykvm-guest: KEY=0xVALUE" */
static __attribute__((unused)) void say(const char *key, u64 value)
{
    static const char digits[] = "0123456789abcdef";
    char text[17];
    int at;

    for (at = 16; at-- > 0; value >>= 4)
        text[at] = digits[value & 15];
    text[16] = 0;
    print("anykvm-guest: ");
    print(key);
    print("=0x");
    print(text);
    print("\n");
}

/* One line of what is wrong; the value is 1, for adding up. */
static __attribute__((unused)) int wrong(const char *what)
{
    print("anykvm-guest: wrong: ");
    print(what);
    print("\n");
    return 1;
}

static int check(void);

/* The stack at the program's start: argc, argv, 0, environment, 0, auxiliary vector (System V ABI). */
static __attribute__((unused)) unsigned long *initial_stack;

__attribute__((used)) static void begin(unsigned long *stack)
{
    initial_stack = stack;
    call(__NR_exit_group, check(), 0, 0, 0, 0, 0);
    __builtin_trap();
}

/* The stack is aligned before the call, as functions expect. */
#ifdef __x86_64__
asm(".globl _start\n_start: xor %ebp, %ebp\n mov %rsp, %rdi\n and $-16, %rsp\n call begin\n");
#else
asm(".globl _start\n_start: xor %ebp, %ebp\n mov %esp, %eax\n and $-16, %esp\n sub $12, %esp\n"
    "push %eax\n call begin\n");
#endif
