//! The tables of `docs/api.md`, made from those of the code.

use std::fmt::Write;

use crate::capability_table::{self, CAPABILITIES, CapabilityValue};
use crate::ioctl_table::{self, IOCTLS, IoctlState, ObjectKind};
use crate::pages::{self, Part, paragraph};
use crate::paravirt_table::{FEATURES, Offer};

const PARTS: &[Part] = &[
    ("system-ioctls", || ioctls(ObjectKind::System)),
    ("vm-ioctls", || ioctls(ObjectKind::Vm)),
    ("vcpu-ioctls", || ioctls(ObjectKind::Vcpu)),
    ("device-ioctls", || ioctls(ObjectKind::Device)),
    ("foreign-ioctls", foreign_ioctls),
    ("capabilities", || capabilities(true)),
    ("absent-capabilities", || capabilities(false)),
    ("foreign-capabilities", foreign_capabilities),
    ("features", features),
];

fn ioctls(on: ObjectKind) -> String {
    let mut text = String::from("| ioctl | section | state |\n|---|---|---|\n");
    for row in IOCTLS.iter().filter(|row| row.on == on) {
        let state = match row.state {
            IoctlState::Works => "works".to_owned(),
            IoctlState::Refused(errno, why) => format!("{errno:?}: {why}"),
        };
        let _ = writeln!(text, "| {} | {} | {state} |", row.name(), row.section);
    }
    text
}

/// A paragraph for each group of names.
fn groups<'a>(groups: impl Iterator<Item = (&'a str, Vec<&'a str>)>) -> String {
    let lists = groups.map(|(group, names)| {
        let words = std::iter::once(format!("**{group}**:"));
        paragraph(words.chain(names.into_iter().map(str::to_owned)))
    });
    lists.collect::<Vec<_>>().join("\n")
}

fn foreign_ioctls() -> String {
    groups(
        ioctl_table::FOREIGN
            .iter()
            .map(|(g, names)| (*g, names.to_vec())),
    )
}

fn foreign_capabilities() -> String {
    let names = |rows: &[(u32, &'static str)]| rows.iter().map(|(_, name)| *name).collect();
    let rows = capability_table::FOREIGN.iter();
    groups(rows.map(|(g, rows)| (*g, names(rows))))
}

fn capabilities(present: bool) -> String {
    let mut text = String::from(if present {
        "| capability | value | enabled on | what it stands for |\n|---|---|---|---|\n"
    } else {
        "| capability | why it is 0 |\n|---|---|\n"
    });
    for row in CAPABILITIES {
        let value = match row.value {
            CapabilityValue::Absent if present => continue,
            CapabilityValue::Absent => {
                let _ = writeln!(text, "| {} | {} |", row.name, row.about);
                continue;
            }
            _ if !present => continue,
            CapabilityValue::Is(value) => value.to_string(),
            CapabilityValue::Of(_) => "host's".to_owned(),
        };
        let on = row.enabled_on.map_or(String::new(), |on| on.to_string());
        let _ = writeln!(text, "| {} | {value} | {on} | {} |", row.name, row.about);
    }
    text
}

fn features() -> String {
    let mut text = String::from("| feature | bit | offered by | meaning |\n|---|---|---|---|\n");
    for f in FEATURES {
        let offer = match f.offer {
            Offer::Kvm => "KVM",
            Offer::Host => "KVM, if the host can",
            Offer::Monitor => "monitor",
            Offer::Absent => "nobody",
        };
        let _ = writeln!(text, "| {} | {} | {offer} | {} |", f.name, f.bit, f.about);
    }
    text
}

#[test]
fn the_page_about_the_api_is_up_to_date() {
    pages::check("api.md", PARTS);
}
