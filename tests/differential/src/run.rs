//! Runs cases on all engines and keeps account.

use crate::case::{Case, End, Engine, Outcome};
use crate::compare::{Difference, differences, translation_differences};
use crate::host::Host;
use crate::interpreter::{Interpreter, Way};
use crate::minimise;
use crate::text;
use crate::tolerated;
use iced_x86::{Code, Decoder, DecoderOptions};
use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;

/// Bytes of the longest instruction.
const LONGEST: usize = 15;

/// All engines.
pub struct Engines {
    /// The reference.
    pub host: Host,
    /// Is compared with the host.
    pub interpreter: Interpreter,
    /// Is compared with the interpreter.
    pub translated: Interpreter,
    /// The XSAVE components that the host and this processor have.
    pub components: u64,
    /// How cases ended in the interpreter; those of more than one instruction apart.
    pub ends: BTreeMap<(bool, String), u64>,
}

/// What came of a case.
pub enum Verdict {
    /// No difference.
    Same,
    /// Only flags that are undefined.
    Undefined(Vec<Difference>),
    /// A difference with a reason: the rule's name.
    Tolerated(&'static str),
    /// A difference without one.
    Different(Vec<Difference>),
}

impl Engines {
    /// All engines.
    pub fn new() -> std::io::Result<Self> {
        let host = Host::new()?;
        let interpreter = Interpreter::new(Way::Interpreted);
        let components = host.components() & interpreter.components();
        Ok(Self {
            host,
            interpreter,
            translated: Interpreter::new(Way::Translated),
            components,
            ends: BTreeMap::new(),
        })
    }

    /// Runs some cases, at most a batch of the host's: on the host at the same time as here.
    pub fn run(&mut self, cases: &[Case]) -> Vec<Verdict> {
        self.host.start(cases);
        let mut interpreted = self.interpreter.run(cases);
        let mut translated = self.translated.run(cases);
        let host = self.host.finish(cases);
        let all = cases.iter().zip(&host);
        for (((case, h), i), t) in all.zip(&mut interpreted).zip(&mut translated) {
            let endless = [&h.end, &i.end, &t.end].map(|end| *end == End::Endless);
            // A long loop, for one of them too long.
            if endless.contains(&true) && endless.contains(&false) {
                if endless[1] {
                    *i = self.interpreter.run_longer(case);
                }
                if endless[2] {
                    *t = self.translated.run_longer(case);
                }
            }
        }
        let mut verdicts = Vec::with_capacity(cases.len());
        for (case, i) in cases.iter().zip(&interpreted) {
            let end = match &i.end {
                End::Exception { vector, .. } => format!("vector {vector}"),
                other => format!("{other:?}"),
            };
            let long = case.code.len() > LONGEST;
            *self.ends.entry((long, end)).or_insert(0) += 1;
        }
        for (((case, h), i), t) in cases.iter().zip(&host).zip(&interpreted).zip(&translated) {
            verdicts.push(match self.against_host(case, h, i) {
                different @ Verdict::Different(_) => different,
                other => match translation_differences(case, i, t) {
                    list if list.is_empty() => other,
                    list => Verdict::Different(list),
                },
            });
        }
        verdicts
    }

    fn against_host(&self, case: &Case, host: &Outcome, interpreted: &Outcome) -> Verdict {
        let list = differences(case, host, interpreted, self.components);
        if list.is_empty() {
            Verdict::Same
        } else if let Some(rule) = tolerated::explanation(case, host, interpreted, &list) {
            Verdict::Tolerated(rule.name)
        } else if list.iter().all(|d| d.undefined) {
            Verdict::Undefined(list)
        } else {
            Verdict::Different(list)
        }
    }

    /// The differences of one case that have no reason.
    pub fn different(&mut self, case: &Case) -> Option<Vec<Difference>> {
        match self.run(std::slice::from_ref(case)).pop() {
            Some(Verdict::Different(list)) => Some(list),
            _ => None,
        }
    }
}

/// A difference that was found, as small as it could be made.
pub struct Failure {
    /// The case.
    pub case: Case,
    /// What differs.
    pub differences: Vec<Difference>,
    /// How many cases looked the same from outside.
    pub count: u64,
}

impl Failure {
    /// The case as a file, with what differs.
    pub fn text(&self) -> String {
        let mut out = text::print(&self.case);
        for d in &self.differences {
            let _ = writeln!(out, "# {d}");
        }
        out
    }
}

/// The account of a run.
#[derive(Default)]
pub struct Account {
    /// Cases run.
    pub cases: u64,
    /// Instructions that cases began with, by code, for 64 and 32 bits.
    pub codes: HashMap<(u32, Code), u64>,
    /// Cases whose only differences were undefined flags, by mnemonic.
    pub undefined: BTreeMap<String, u64>,
    /// Tolerated differences by rule.
    pub tolerated: BTreeMap<&'static str, u64>,
    /// Failures by first instruction and first difference.
    pub failures: BTreeMap<String, Failure>,
}

impl Account {
    /// Enters a batch. New failures are made small with the engines.
    pub fn enter(&mut self, engines: &mut Engines, cases: &[Case], verdicts: Vec<Verdict>) {
        for (case, verdict) in cases.iter().zip(verdicts) {
            self.cases += 1;
            let mut decoder =
                Decoder::with_ip(case.bits, &case.code, case.state.rip, DecoderOptions::NONE);
            let first = decoder.decode();
            *self.codes.entry((case.bits, first.code())).or_insert(0) += 1;
            match verdict {
                Verdict::Same => {}
                Verdict::Tolerated(name) => *self.tolerated.entry(name).or_insert(0) += 1,
                Verdict::Undefined(_) => {
                    let name = format!("{:?}", first.mnemonic());
                    *self.undefined.entry(name).or_insert(0) += 1;
                }
                Verdict::Different(list) => self.fail(engines, case, list),
            }
        }
    }

    fn fail(&mut self, engines: &mut Engines, case: &Case, list: Vec<Difference>) {
        let key = key(case, &list);
        if let Some(known) = self.failures.get_mut(&key) {
            known.count += 1;
            return;
        }
        let (case, differences) = minimise::minimal(engines, case, list);
        let failure = Failure {
            case,
            differences,
            count: 1,
        };
        self.failures.insert(key, failure);
    }
}

fn key(case: &Case, list: &[Difference]) -> String {
    let mut decoder = Decoder::with_ip(case.bits, &case.code, case.state.rip, DecoderOptions::NONE);
    let names: Vec<String> = if case.code.len() > LONGEST {
        vec!["block".to_owned()]
    } else {
        decoder
            .iter()
            .take(1)
            .map(|i| format!("{:?}", i.mnemonic()))
            .collect()
    };
    let what = list.first().map_or(String::new(), |d| {
        d.what
            .trim_end_matches(|c: char| c.is_ascii_hexdigit())
            .to_owned()
    });
    format!("{} {} {what}", case.bits, names.join(" "))
}
