//! This project's processor as an engine, interpreting or translating: at CPL 3, with page tables that
//! map what the host's process maps, and descriptor tables as Linux has them.

mod devices;
mod tables;

use crate::case::{
    CODE, CODE_PAGES, Case, DATA, DATA_PAGES, End, Engine, MAX_CODE, Outcome, PAGE, pattern,
};
use crate::host::host_xcr0;
use crate::layout::Layout;
use anykvm_cpu::cpuid::{CpuidEntry, CpuidTable, supported};
use anykvm_cpu::events::Events;
use anykvm_cpu::memory::mapping::Mapping;
use anykvm_cpu::memory::{GuestMemory, MemoryMap, Slot};
use anykvm_cpu::state::{reg, seg};
use anykvm_cpu::{Cpu, Exit, Requests, requests};
use anykvm_jit::{Jit, Options};
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

/// Guest-physical address of the code pages.
const CODE_GPA: u64 = 0x4_0000;
/// Guest-physical address of the data pages.
const DATA_GPA: u64 = 0x5_0000;
const RAM: usize = 0x10_0000;
/// Instructions after which a case is endless. A REP instruction counts once for each time it is
/// entered.
const BUDGET: u64 = 200_000;
/// Processor time after which a translated case is endless: enough for many times the budget.
const PATIENCE: Duration = Duration::from_millis(30);
/// How many times as long a case is run that has an end elsewhere.
const LONGER: u32 = 1000;
const INT3: u8 = 0xcc;

/// How the processor executes code.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Way {
    /// The interpreter alone.
    #[default]
    Interpreted,
    /// Everything that can be is translated before it runs.
    Translated,
}

thread_local! {
    /// A case runs.
    static RUNNING: Cell<bool> = const { Cell::new(false) };
}

/// From now on nothing is printed of panics of the processor: they are outcomes, told with their cases.
pub fn keep_panics_quiet() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if !RUNNING.get() {
            usual(panic);
        }
    }));
}

/// The processor.
pub struct Interpreter {
    way: Way,
    cpu: Cpu,
    memory: Arc<GuestMemory>,
    layout: Layout,
    pristine: Vec<u8>,
    /// Data as the current case began with it.
    initial: Vec<u8>,
    last_code: (u64, usize),
    outcomes: Vec<Outcome>,
}

impl Default for Interpreter {
    fn default() -> Self {
        Self::new(Way::default())
    }
}

impl Interpreter {
    /// A processor with the CPUID this project offers.
    pub fn new(way: Way) -> Self {
        let memory = Arc::new(GuestMemory::new());
        let ram = Arc::new(Mapping::anonymous(RAM).expect("memory for the guest"));
        let slot = Slot::owned(0, 0, RAM as u64, ram, 0, false, None);
        let slot = Arc::new(slot.expect("a memory slot"));
        let map = MemoryMap::new(vec![slot]).expect("a memory map");
        memory.replace(0, map, None);
        let requests = Arc::new(Requests::default());
        let mut cpu = Cpu::new(memory.clone(), Arc::new(devices::None), requests);
        let cpuid = CpuidTable::new(offered());
        // XRSTOR looks at the components that are enabled and not asked for, too.
        let xcr0 = cpuid.xcr0_supported() & host_xcr0();
        cpu.set_cpuid(cpuid);
        tables::write(&memory);
        tables::system_state(&mut cpu.state);
        cpu.state.xcr0 = xcr0;
        cpu.state_changed();
        if way == Way::Translated {
            cpu.set_translator(Some(Box::new(translator())));
            watch(&cpu);
        }
        let pristine = pattern();
        put(&memory, CODE_GPA, &[INT3; CODE_PAGES * PAGE]);
        put(&memory, DATA_GPA, &pristine);
        Self {
            way,
            cpu,
            memory,
            layout: Layout::of_guest(xcr0),
            initial: pristine.clone(),
            pristine,
            last_code: (0, 0),
            outcomes: Vec::new(),
        }
    }

    /// The components of [`crate::case::State`] it has.
    pub fn components(&self) -> u64 {
        self.layout.components
    }

    /// Its CPUID.
    pub fn cpuid(&self) -> &CpuidTable {
        &self.cpu.cpuid
    }

    /// Blocks that were interpreted so far.
    pub fn interpreted_blocks(&self) -> u64 {
        self.cpu.counters.blocks
    }

    /// Runs a case that was endless, but has an end elsewhere, much longer.
    pub fn run_longer(&mut self, case: &Case) -> Outcome {
        self.run_one(case, LONGER)
    }

    /// `times`: how many times as long as usual before it is endless.
    fn run_one(&mut self, case: &Case, times: u32) -> Outcome {
        self.place(case);
        RUNNING.set(true);
        let run = catch_unwind(AssertUnwindSafe(|| self.run_code(times)));
        RUNNING.set(false);
        let Ok(exit) = run else {
            let outcome = Outcome {
                state: case.state,
                end: End::Failed("panicked".to_owned()),
                pages: Vec::new(),
                rest: None,
            };
            *self = Self::new(self.way);
            return outcome;
        };
        self.outcome(case, exit)
    }

    fn run_code(&mut self, times: u32) -> Exit {
        if self.way == Way::Interpreted {
            return self.cpu.run(BUDGET * u64::from(times));
        }
        // Translated code knows no budget; a thread that asks for the processor takes its place.
        let mut end = None;
        loop {
            match self.cpu.run(u64::MAX) {
                Exit::Request => {
                    self.cpu.requests().take(requests::KICK);
                    let now = thread_time();
                    if now > *end.get_or_insert(now + PATIENCE * times) {
                        return Exit::Budget;
                    }
                }
                other => return other,
            }
        }
    }

    /// Makes memory and registers those of the case.
    fn place(&mut self, case: &Case) {
        let (at, len) = self.last_code;
        let rest = &[INT3; MAX_CODE][..len];
        put(&self.memory, CODE_GPA + at, rest);
        let at = case.state.rip - CODE;
        let len = case.code.len().min(CODE_PAGES * PAGE - at as usize);
        put(&self.memory, CODE_GPA + at, &case.code[..len]);
        self.last_code = (at, len);
        for p in &case.patches {
            let at = (p.at - DATA) as usize;
            self.initial[at..at + p.bytes.len()].copy_from_slice(&p.bytes);
            put(&self.memory, DATA_GPA + at as u64, &p.bytes);
        }
        let s = &mut self.cpu.state;
        for (n, value) in (0..).zip(case.state.gpr) {
            s.regs[n] = value;
        }
        s.set_rip(case.state.rip);
        s.rflags = case.state.rflags;
        for (n, selector) in case.state.selectors.into_iter().enumerate() {
            s.seg[n] = tables::segment(selector);
        }
        s.seg[usize::from(seg::FS)].base = case.state.fs_base;
        s.seg[usize::from(seg::GS)].base = case.state.gs_base;
        s.events = Events::default();
        s.cr2 = 0;
        self.layout.store(&case.state, &mut s.xsave.0);
        s.xsave.0[512..576].fill(0);
        self.cpu.update_mode();
    }

    fn outcome(&mut self, case: &Case, exit: Exit) -> Outcome {
        let s = &self.cpu.state;
        let mut state = case.state;
        for (n, value) in (0..).zip(&mut state.gpr) {
            *value = s.regs[n];
        }
        for (n, selector) in state.selectors.iter_mut().enumerate() {
            *selector = s.seg[n].selector;
        }
        (state.rip, state.rflags) = (s.rip(), s.rflags);
        state.fs_base = s.seg[usize::from(seg::FS)].base;
        state.gs_base = s.seg[usize::from(seg::GS)].base;
        let mut area = s.xsave.0;
        area[512..520].copy_from_slice(&self.layout.components.to_le_bytes());
        self.layout.load(&mut state, &area);
        let end = match (exit, tables::handled(s, &self.memory)) {
            (Exit::Hlt, Some(event)) => {
                state.rip = event.rip;
                state.rflags = event.rflags;
                state.gpr[usize::from(reg::RSP)] = event.rsp;
                state.selectors[usize::from(seg::CS)] = event.cs;
                state.selectors[usize::from(seg::SS)] = event.ss;
                End::of_exception(case, &mut state.rip, event.vector, event.error, s.cr2)
            }
            (Exit::Budget, _) => End::Endless,
            (other, _) => End::Failed(format!("{other:?}")),
        };
        let rest = self.rest();
        let pages = self.changed_pages(case);
        Outcome {
            state,
            end,
            pages,
            rest: Some(rest),
        }
    }

    /// See [`Outcome::rest`].
    fn rest(&self) -> Box<[u64]> {
        let s = &self.cpu.state;
        let area = s.xsave.0.chunks_exact(8);
        let area = area.map(|word| word.iter().rev().fold(0, |w, b| w << 8 | u64::from(*b)));
        let segments = s.seg.iter().flat_map(|s| {
            let hidden = u64::from(s.attr) | u64::from(s.selector) << 16;
            [s.base, u64::from(s.limit) | hidden << 32]
        });
        area.chain([s.cr2, s.dr6, u64::from(s.events.shadow)])
            .chain(segments)
            .collect()
    }

    /// The data pages that changed; the data is restored.
    fn changed_pages(&mut self, case: &Case) -> Vec<(usize, Vec<u8>)> {
        let mut pages = Vec::new();
        let mut now = [0; PAGE];
        for n in 0..DATA_PAGES {
            let all = n * PAGE..(n + 1) * PAGE;
            let gpa = DATA_GPA + all.start as u64;
            self.memory.read(gpa, &mut now).expect("the data is RAM");
            if now[..] != self.initial[all.clone()] {
                pages.push((n, now.to_vec()));
                put(&self.memory, gpa, &self.pristine[all]);
            }
        }
        for p in &case.patches {
            let at = (p.at - DATA) as usize;
            let all = at..at + p.bytes.len();
            self.initial[all.clone()].copy_from_slice(&self.pristine[all.clone()]);
            put(&self.memory, DATA_GPA + at as u64, &self.pristine[all]);
        }
        pages
    }
}

fn translator() -> Jit {
    Jit::new(Options {
        cache: 8 << 20,
        threshold: 1,
        ..Options::default()
    })
    .expect("executable memory")
}

/// Asks for the processor again and again until it is gone.
fn watch(cpu: &Cpu) {
    let word = Arc::downgrade(cpu.requests());
    std::thread::spawn(move || {
        while let Some(word) = word.upgrade() {
            word.set(requests::KICK);
            drop(word);
            std::thread::sleep(Duration::from_millis(10));
        }
    });
}

/// Processor time of this thread.
fn thread_time() -> Duration {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: fills the structure.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut now) };
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// The CPUID this project offers, but for linear addresses no wider than the host's: WRFSBASE checks
/// its operand against what the processor has, whatever CR4.LA57 is.
fn offered() -> Vec<CpuidEntry> {
    const LA57: u32 = 1 << 16;
    let host = std::arch::x86_64::__cpuid_count(7, 0).ecx;
    let mut entries = supported();
    for e in &mut entries {
        if (e.function, e.index) == (7, 0) {
            e.ecx &= !LA57 | host;
        }
    }
    entries
}

fn put(memory: &GuestMemory, gpa: u64, bytes: &[u8]) {
    memory.write(gpa, bytes).expect("the address is RAM");
}

impl Engine for Interpreter {
    fn name(&self) -> &str {
        match self.way {
            Way::Interpreted => "interpreter",
            Way::Translated => "translated code",
        }
    }

    fn start(&mut self, cases: &[Case]) {
        self.outcomes = cases.iter().map(|c| self.run_one(c, 1)).collect();
    }

    fn finish(&mut self, _: &[Case]) -> Vec<Outcome> {
        std::mem::take(&mut self.outcomes)
    }
}
