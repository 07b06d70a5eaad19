/* A guest that is never idle, for its machine to be moved while it runs. Two processes write memory, each page in
 * the pattern that a table beside it says, and compare it before they write it again; one does the same with
 * blocks of a disk, past the page cache; one starts processes; two read the clocks in a tight loop, each on its
 * own processor, and compare with what the other has read. The first says every second how far all are, until
 * it reads a line: then everything is compared once more. "wrong" lines say what was lost; "migrate passed=..."
 * ends it. With an argument, nothing is done to the disk. */

#include "linux.h"

#define PROT_READ_WRITE 3
#define MAP_SHARED_ANONYMOUS 0x21
#define SIGCHLD 17
#define O_RDWR_DIRECT 040002
#define POLLIN 1
#define AT_SYSINFO_EHDR 33

#define PAGE 4096ul
#define PAGES 2048
#define BLOCKS 2048
#define BLOCK 4096ul

enum { MONOTONIC = 1, RAW = 4, BOOTTIME = 7, CLOCKS = 3 };
static const long clock_numbers[CLOCKS] = {MONOTONIC, RAW, BOOTTIME};

struct timespec {
    long seconds, nanoseconds;
};

/* What the processes share. */
struct shared {
    volatile u32 stop;
    volatile u32 errors;
    volatile u64 pages[2], blocks, forks, readings[2];
    /* The latest time that anybody has read, and the latest TSC. */
    volatile u64 latest[CLOCKS + 1];
};

static struct shared *shared;

static long map(u64 length)
{
    return call(__NR_mmap, 0, length, PROT_READ_WRITE, MAP_SHARED_ANONYMOUS, -1, 0);
}

static u32 next(u64 *state)
{
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return (*state * 0x2545f4914f6cdd1dull) >> 32;
}

static u64 mix(u64 value)
{
    value ^= value >> 33;
    value *= 0xff51afd7ed558ccdull;
    value ^= value >> 33;
    value *= 0xc4ceb9fe1a85ec53ull;
    return value ^ value >> 33;
}

static void lost(const char *what, u64 where)
{
    __atomic_fetch_add(&shared->errors, 1, __ATOMIC_SEQ_CST);
    print("anykvm-guest: wrong: ");
    print(what);
    print("\n");
    say("wrong at", where);
}

/* The pattern: a run of one number, a sequence, and the version, counted up by a locked instruction. */
static void fill(u64 *page, u64 seed, u32 version)
{
    u64 value = mix(seed ^ version);
    u64 *at = page + 1, count = 255;
    unsigned n;

    asm volatile("rep stosq" : "+D"(at), "+c"(count) : "a"(value) : "memory");
    for (n = 256; n < PAGE / 8; n++)
        page[n] = value + n;
}

static int holds(const u64 *page, u64 seed, u32 version)
{
    u64 value = mix(seed ^ version);
    unsigned n;

    for (n = 1; n < 256; n++)
        if (page[n] != value)
            return 0;
    for (; n < PAGE / 8; n++)
        if (page[n] != value + n)
            return 0;
    return page[0] == version;
}

static void memory_worker(unsigned which)
{
    u64 state = 0x9e3779b97f4a7c15ull + which, seed = (u64)which << 40;
    u64 *pages = (u64 *)map(PAGES * PAGE);
    u32 *versions = (u32 *)map(PAGES * 4);
    unsigned n;

    for (n = 0; n < PAGES; n++)
        fill(pages + n * (PAGE / 8), seed + n, 0);
    while (!shared->stop) {
        u64 *page;

        n = next(&state) % PAGES;
        page = pages + n * (PAGE / 8);
        if (!holds(page, seed + n, versions[n]))
            lost("a page of memory", n);
        versions[n]++;
        __atomic_fetch_add(page, 1, __ATOMIC_SEQ_CST);
        fill(page, seed + n, versions[n]);
        shared->pages[which]++;
    }
    for (n = 0; n < PAGES; n++)
        if (!holds(pages + n * (PAGE / 8), seed + n, versions[n]))
            lost("a page of memory in the end", n);
}

static void transfer(int disk, long number, u64 *buffer, u64 block)
{
    if (call(number, disk, (long)buffer, BLOCK, block * BLOCK, 0, 0) != (long)BLOCK)
        lost("a block could not be read or written", block);
}

static void disk_worker(void)
{
    int disk = call(__NR_open, (long)"/dev/vda", O_RDWR_DIRECT, 0, 0, 0, 0);
    u64 *buffer = (u64 *)map(BLOCK), state = 77, seed = 3ull << 40;
    u32 *versions = (u32 *)map(BLOCKS * 4);
    unsigned n;

    if (disk < 0) {
        lost("no disk", -disk);
        return;
    }
    while (!shared->stop) {
        n = next(&state) % BLOCKS;
        if (versions[n]) {
            transfer(disk, __NR_pread64, buffer, n);
            if (!holds(buffer, seed + n, versions[n]))
                lost("a block of the disk", n);
        }
        buffer[0] = ++versions[n];
        fill(buffer, seed + n, versions[n]);
        transfer(disk, __NR_pwrite64, buffer, n);
        shared->blocks++;
    }
    for (n = 0; n < BLOCKS; n++) {
        if (!versions[n])
            continue;
        transfer(disk, __NR_pread64, buffer, n);
        if (!holds(buffer, seed + n, versions[n]))
            lost("a block of the disk in the end", n);
    }
}

/* What a child computes, in few bits. */
static int work(u32 number)
{
    u64 sum = number;
    unsigned n;

    for (n = 0; n < 200; n++)
        sum = mix(sum + n);
    return sum & 0x7f;
}

/* Children with a stack and data of their own, which end with a number that is known. */
static void fork_worker(void)
{
    u64 state = 99;

    while (!shared->stop) {
        u32 number = next(&state);
        int status = 0;
        long child = call(__NR_fork, 0, 0, 0, 0, 0, 0);

        if (child == 0)
            call(__NR_exit_group, work(number), 0, 0, 0, 0, 0);
        if (child < 0 || call(__NR_wait4, child, (long)&status, 0, 0, 0, 0) != child ||
            status != work(number) << 8)
            lost("a process", status);
        shared->forks++;
    }
}

typedef long clock_function(long, struct timespec *);

/* The kernel's own function for reading clocks, from the object that it maps into each process. */
static clock_function *find_vdso(void)
{
    unsigned long *at = initial_stack + 1 + initial_stack[0] + 1;
    const u8 *image = 0;
    const u64 *dynamic = 0;
    const u8 *symbols = 0, *names = 0;
    const u32 *hash = 0;
    unsigned n, k;

    while (*at)
        at++;
    for (at++; at[0]; at += 2)
        if (at[0] == AT_SYSINFO_EHDR)
            image = (const u8 *)at[1];
    if (!image)
        return 0;
    for (n = 0; n < *(const u16 *)(image + 56); n++) {
        const u8 *header = image + *(const u64 *)(image + 32) + n * 56;

        if (*(const u32 *)header == 2) /* PT_DYNAMIC */
            dynamic = (const u64 *)(image + *(const u64 *)(header + 8));
    }
    for (; dynamic && dynamic[0]; dynamic += 2) {
        if (dynamic[0] == 4) /* DT_HASH */
            hash = (const u32 *)(image + dynamic[1]);
        if (dynamic[0] == 5) /* DT_STRTAB */
            names = image + dynamic[1];
        if (dynamic[0] == 6) /* DT_SYMTAB */
            symbols = image + dynamic[1];
    }
    if (!hash || !names || !symbols)
        return 0;
    for (n = 0; n < hash[1]; n++) {
        static const char wanted[] = "__vdso_clock_gettime";
        const u8 *symbol = symbols + n * 24;
        const char *name = (const char *)names + *(const u32 *)symbol;

        for (k = 0; k < sizeof wanted && name[k] == wanted[k]; k++)
            ;
        if (k == sizeof wanted)
            return (clock_function *)(image + *(const u64 *)(symbol + 8));
    }
    return 0;
}

static u64 time_stamp(void)
{
    u32 low, high;

    asm volatile("lfence; rdtsc; lfence" : "=a"(low), "=d"(high) : : "memory");
    return low | (u64)high << 32;
}

/* Time read now must not be before what anybody has read already. */
static void compare(unsigned clock, u64 before, u64 now)
{
    if (now < before) {
        static const char *const names[] = {"CLOCK_MONOTONIC went back", "CLOCK_MONOTONIC_RAW went back",
                                            "CLOCK_BOOTTIME went back", "the TSC went back"};

        lost(names[clock], before - now);
        return;
    }
    while (before < now && !__atomic_compare_exchange_n(&shared->latest[clock], &before, now, 0,
                                                        __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
        ;
}

static void clock_worker(unsigned which)
{
    clock_function *vdso = find_vdso();
    u64 mask = 1ull << which;
    unsigned turn = 0;

    call(__NR_sched_setaffinity, 0, sizeof mask, (long)&mask, 0, 0, 0);
    if (!vdso)
        lost("no vDSO", 0);
    while (!shared->stop) {
        unsigned clock;

        for (clock = 0; clock < CLOCKS; clock++) {
            u64 before = __atomic_load_n(&shared->latest[clock], __ATOMIC_SEQ_CST);
            struct timespec time;

            /* Mostly without entering the kernel. */
            if (turn % 8 == 0 || !vdso)
                call(__NR_clock_gettime, clock_numbers[clock], (long)&time, 0, 0, 0, 0);
            else
                vdso(clock_numbers[clock], &time);
            compare(clock, before, time.seconds * 1000000000ull + time.nanoseconds);
        }
        {
            u64 before = __atomic_load_n(&shared->latest[CLOCKS], __ATOMIC_SEQ_CST);

            compare(CLOCKS, before, time_stamp());
        }
        turn++;
        shared->readings[which]++;
        /* The others want the processors, too. */
        if (turn % 512 == 0) {
            struct timespec pause = {0, 10000000};

            call(__NR_nanosleep, (long)&pause, 0, 0, 0, 0, 0);
        }
    }
}

static void report(void)
{
    say("migrate pages", shared->pages[0] + shared->pages[1]);
    say("migrate blocks", shared->blocks);
    say("migrate forks", shared->forks);
    say("migrate readings 0", shared->readings[0]);
    say("migrate readings 1", shared->readings[1]);
    say("migrate errors", shared->errors);
}

static int check(void)
{
    struct {
        int fd;
        short events, revents;
    } line = {0, POLLIN, 0};
    unsigned n;

    shared = (struct shared *)map(PAGE);
    for (n = 0; n < 6; n++) {
        if (call(__NR_fork, 0, 0, 0, 0, 0, 0) != 0)
            continue;
        switch (n) {
        case 0:
        case 1:
            memory_worker(n);
            break;
        case 2:
            if (initial_stack[0] == 1)
                disk_worker();
            break;
        case 3:
            fork_worker();
            break;
        default:
            clock_worker(n - 4);
        }
        return 0;
    }
    while (call(__NR_poll, (long)&line, 1, 1000, 0, 0, 0) == 0) {
        report();
        print("anykvm-guest: migrate at work\n");
    }
    shared->stop = 1;
    for (n = 0; n < 6; n++)
        call(__NR_wait4, -1, 0, 0, 0, 0, 0);
    report();
    return shared->errors != 0;
}
