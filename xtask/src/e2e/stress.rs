//! stress-ng on four processors, which is more than small hosts have. Its stressors verify their own results.
//! A short form among the tests, in which each does a fixed amount of work, and `cargo xtask stress`, in which
//! each runs for a given time.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};

use super::console::Console;
use super::qemu::{self, Irqchip};
use super::{Bench, Needs, Test};
use crate::guest::Overlay;

#[derive(clap::Args)]
pub struct StressArgs {
    /// Run only stressors whose lines contain one of these
    filters: Vec<String>,
    /// How long each of them runs
    #[arg(long, default_value_t = 10)]
    seconds: u32,
    /// The processor's vendor as the guest sees it; stress-ng's tests of x86's own instructions run on
    /// GenuineIntel only
    #[arg(long, default_value = INTEL)]
    vendor: String,
}

const INTEL: &str = "GenuineIntel";
const CPUS: usize = 4;

/// Names, and what stress-ng is to do: fixed amounts of work, several stressors at a time.
const SHORT: &[(&str, &str)] = &[
    ("cpu", "--cpu 2 --cpu-method all --cpu-ops 84"),
    (
        "vectors",
        "--vecmath 1 --vecmath-ops 2 --vecwide 1 --vecwide-ops 4 \
         --vecshuf 1 --vecshuf-method all --vecshuf-ops 12 --vecfp 1 --vecfp-method all --vecfp-ops 24",
    ),
    (
        "floats",
        "--fp 1 --fp-method all --fp-ops 8 --fp-error 1 --fp-error-ops 20 \
         --matrix 1 --matrix-method all --matrix-size 32 --matrix-ops 40 \
         --matrix-3d 1 --matrix-3d-method all --matrix-3d-size 16 --matrix-3d-ops 40",
    ),
    (
        "memory",
        "--vm 4 --vm-method all --vm-bytes 512k --vm-ops 200",
    ),
    (
        "pages",
        "--mmap 1 --mmap-bytes 1m --mmap-ops 4 --mprotect 1 --mprotect-ops 200 --tlb-shootdown 1 \
         --tlb-shootdown-ops 2 --membarrier 1 --membarrier-ops 20 --fault 1 --fault-ops 100",
    ),
    (
        "signals",
        "--sigsegv 1 --sigsegv-ops 500 --sigfpe 1 --sigfpe-ops 500 --signal 1 --signal-ops 1000 \
         --sigq 1 --sigq-ops 500 --sigtrap 1 --sigtrap-ops 200 --sigsuspend 1 --sigsuspend-ops 200 \
         --sigabrt 1 --sigabrt-ops 20 --bad-altstack 1 --bad-altstack-ops 20",
    ),
    (
        "tasks",
        "--fork 1 --fork-ops 50 --vfork 1 --vfork-ops 50 --clone 1 --clone-ops 50 --context 1 \
         --context-ops 1000 --switch 1 --switch-ops 1000 --pipe 1 --pipe-ops 1000 --ptrace 1 --ptrace-ops 200",
    ),
    (
        "locks",
        "--atomic 2 --atomic-ops 10 --futex 2 --futex-ops 2000 --lockbus 2 --lockbus-ops 1 \
         --dekker 1 --dekker-ops 2000 --peterson 1 --peterson-ops 2000 --cacheline 1 --cacheline-ops 4",
    ),
    (
        "x86",
        "--x86syscall 1 --x86syscall-ops 1 --tsc 1 --tsc-ops 2 --rdrand 1 --rdrand-ops 2 --nop 1 \
         --nop-ops 4 --x86cpuid 1 --x86cpuid-ops 4 --waitcpu 1 --waitcpu-ops 4 --vdso 1 --vdso-ops 1000",
    ),
    (
        "faults",
        "--opcode 1 --opcode-method inc --opcode-ops 10 --priv-instr 1 --priv-instr-ops 50 \
         --ioport 1 --ioport-ops 20 --sysbadaddr 1 --sysbadaddr-ops 20",
    ),
    (
        "cpu-online",
        "--cpu-online 1 --cpu-online-ops 12 --pathological",
    ),
];

/// Stressors that run one at a time in the long form, four of each, with their options. Those that refuse
/// to be root (exec, spawn) are not among them.
const LONG: &str = "
    cpu --cpu-method all
    vecmath
    vecshuf --vecshuf-method all
    vecwide
    vecfp --vecfp-method all
    fp --fp-method all
    fp-error
    matrix --matrix-method all
    matrix-3d --matrix-3d-method all
    vm --vm-method all --vm-bytes 16m
    vm-addr --vm-addr-method all
    vm-rw
    vm-segv
    vm-splice
    atomic
    futex
    fork
    vfork
    clone
    context
    switch
    pipe
    pthread
    ptrace
    seccomp
    mmap --mmap-bytes 16m
    mmapfixed
    mmapfork
    mmaphuge
    mmapmany
    mprotect
    mremap --mremap-bytes 4m
    madvise
    munmap
    memfd --memfd-bytes 4m
    pagemove
    remap
    rmap
    fault
    userfaultfd --userfaultfd-bytes 1m
    stack
    stackmmap
    bad-altstack
    tlb-shootdown
    membarrier
    icache
    flushcache
    cacheline --cacheline-method all
    l1cache
    lockbus
    misaligned --misaligned-method all
    dekker
    peterson
    mcontend
    mutex
    sem
    affinity
    schedpolicy
    yield
    kill
    sigabrt
    sigchld
    sigfd
    sigfpe
    sigio
    signal
    signest
    sigpending
    sigpipe
    sigq
    sigrt
    sigsegv
    sigsuspend
    sigtrap
    nanosleep
    hrtimers
    timer
    timerfd
    itimer
    clock
    poll
    x86syscall
    x86cpuid
    tsc
    rdrand
    nop --nop-instr random
    far-branch
    vdso
    waitcpu
    opcode --opcode-method random
    opcode --opcode-method inc
    opcode --opcode-method mixed
    opcode --opcode-method text
    priv-instr
    ioport
    sysbadaddr
    usersyscall
    branch
    funccall --funccall-method float80
    funccall --funccall-method uint128
    funcret --funcret-method uint64x128
    funcret --funcret-method longdouble
    goto
    longjmp
    regs
    rotate --rotate-method all
    prefetch
    memcpy --memcpy-method all
    memthrash --memthrash-method all
    str --str-method all
    wcs --wcs-method all
    hash --hash-method all
    crypt
    ipsec-mb
    zlib
    jpeg
    cpu-online --pathological
";

pub fn tests() -> Vec<Test> {
    let lines = SHORT
        .iter()
        .map(|(name, what)| format!("{name} {what}\n"))
        .collect();
    vec![test("stress-smp4", lines, "", INTEL)]
}

/// `cargo xtask stress`: one machine, which runs the stressors one after another.
pub fn run(args: &StressArgs) -> Result<ExitCode> {
    let wanted = |line: &&str| {
        args.filters.is_empty() || args.filters.iter().any(|filter| line.contains(filter))
    };
    let mut lines = String::new();
    let mut limit = LIMIT;
    for line in LONG.lines().map(str::trim).filter(|line| !line.is_empty()) {
        if wanted(&line) {
            let (name, options) = line.split_once(' ').unwrap_or((line, ""));
            lines += &format!(
                "{} --{name} 4 {options}\n",
                line.replace(" --", ",").replace(' ', ":")
            );
            limit += Duration::from_secs(60 + 10 * u64::from(args.seconds));
        }
    }
    if lines.is_empty() {
        bail!("no stressor has such a name");
    }
    let parameters = format!("anykvm.seconds={}", args.seconds);
    let mut test = test("stress", lines, &parameters, &args.vendor);
    test.limit = limit;
    super::run_tests(vec![test], 1)
}

const LIMIT: Duration = Duration::from_secs(600);

/// A machine that runs stress-ng for each of these lines.
fn test(name: &str, lines: String, parameters: &str, vendor: &str) -> Test {
    let (parameters, vendor) = (parameters.to_owned(), vendor.to_owned());
    Test {
        name: name.to_owned(),
        cpus: CPUS,
        limit: LIMIT,
        needs: Needs::Qemu,
        body: Box::new(move |bench, test| stress(bench, test, &lines, &parameters, &vendor)),
    }
}

fn stress(bench: &Bench, test: &Test, lines: &str, parameters: &str, vendor: &str) -> Result<()> {
    let mut overlay = Overlay::new(bench.guest());
    overlay.programs("stress-ng", &["stress-ng"], &["usr/bin/stress-ng"])?;
    overlay.text("stressors", lines);
    let initrd = overlay.write(&bench.file(test, "cpio"))?;
    let mut command = qemu::machine(bench, "q35", Irqchip::On);
    command
        .args(["-cpu", &format!("host,vendor={vendor}")])
        .args(["-m", "2048", "-smp", &test.cpus.to_string(), "-nic", "none"])
        .args(["-serial", "stdio", "-monitor", "none"])
        .args([
            "-append",
            &format!("console=ttyS0 anykvm.task=stress {parameters}"),
        ])
        .arg("-kernel")
        .arg(&bench.guest().kernel)
        .arg("-initrd")
        .arg(&initrd);
    let outcome = qemu::run(bench, test, &mut command)?;
    let console = Console(&outcome.output);
    console.require_done("stress")?;
    console.require("stress failures", "0")?;
    console.require("stress trouble", "0")?;
    console.require("stress runs", &lines.lines().count().to_string())
}
