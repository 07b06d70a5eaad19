//! Integer instructions against the host processor: random encodings, operands and flags; results,
//! flags (undefined ones too), memory, where it ends and which fault it raises must be the same.
//!
//! The same seed gives the same run; `ANYKVM_SEED` gives another, `ANYKVM_ROUNDS` a longer one.

mod harness;
mod native;

use native::compare::check;

#[test]
fn arith_and_logic() {
    check(
        "arith and logic",
        64,
        &[&[
            0x00..=0x05,
            0x08..=0x0d,
            0x10..=0x15,
            0x18..=0x1d,
            0x20..=0x25,
            0x28..=0x2d,
            0x30..=0x35,
            0x38..=0x3d,
            0x80..=0x81,
            0x83..=0x85,
            0xa8..=0xa9,
            0xf6..=0xf7,
            0xfe..=0xfe,
        ]],
        40_000,
    );
}

#[test]
fn shifts() {
    check(
        "shifts",
        64,
        &[&[0xc0..=0xc1, 0xd0..=0xd3], &[0xa4..=0xa5, 0xac..=0xad]],
        20_000,
    );
}

#[test]
fn multiplication_and_division() {
    check(
        "muldiv",
        64,
        &[&[0x69..=0x69, 0x6b..=0x6b, 0xf6..=0xf7], &[0xaf..=0xaf]],
        20_000,
    );
}

#[test]
fn bits() {
    check(
        "bits",
        64,
        &[
            &[],
            &[
                0xa3..=0xa3,
                0xab..=0xab,
                0xb3..=0xb3,
                0xb8..=0xb8,
                0xba..=0xbd,
                0xc8..=0xcf,
            ],
            &[0xf0..=0xf1],
        ],
        20_000,
    );
}

#[test]
fn moves() {
    check(
        "moves",
        64,
        &[
            &[
                0x63..=0x63,
                0x88..=0x8b,
                0x8d..=0x8d,
                0x90..=0x90,
                0x98..=0x99,
                0x9e..=0xa3,
                0xb0..=0xbf,
                0xc6..=0xc7,
                0xd7..=0xd7,
                0xf5..=0xf5,
                0xf8..=0xf9,
                0xfc..=0xfd,
            ],
            &[
                0x18..=0x1f,
                0x40..=0x4f,
                0x90..=0x9f,
                0xb6..=0xb7,
                0xbe..=0xbf,
                0xc3..=0xc3,
            ],
        ],
        30_000,
    );
}

#[test]
fn exchanges() {
    check(
        "exchanges",
        64,
        &[
            &[0x86..=0x87, 0x90..=0x97],
            &[0xb0..=0xb1, 0xc0..=0xc1, 0xc7..=0xc7],
        ],
        20_000,
    );
}

#[test]
fn stack() {
    check(
        "stack",
        64,
        &[&[
            0x50..=0x5f,
            0x68..=0x68,
            0x6a..=0x6a,
            0x8f..=0x8f,
            0xc8..=0xc9,
            0xff..=0xff,
        ]],
        20_000,
    );
}

#[test]
fn branches() {
    check(
        "branches",
        64,
        &[
            &[
                0x70..=0x7f,
                0xc2..=0xc3,
                0xe0..=0xe3,
                0xe8..=0xe9,
                0xeb..=0xeb,
                0xff..=0xff,
            ],
            &[0x80..=0x8f],
        ],
        20_000,
    );
}

#[test]
fn strings() {
    check("strings", 64, &[&[0xa4..=0xa7, 0xaa..=0xaf]], 20_000);
}

#[test]
fn legacy_arith_and_moves() {
    check(
        "32-bit arith and moves",
        32,
        &[
            &[
                0x00..=0x05,
                0x08..=0x0d,
                0x10..=0x15,
                0x18..=0x1d,
                0x20..=0x25,
                0x28..=0x2d,
                0x30..=0x35,
                0x38..=0x3d,
                0x40..=0x4f,
                0x69..=0x69,
                0x6b..=0x6b,
                0x80..=0x8b,
                0x8d..=0x8d,
                0x90..=0x99,
                0x9e..=0xa3,
                0xa8..=0xa9,
                0xb0..=0xbf,
                0xc0..=0xc1,
                0xc6..=0xc7,
                0xd0..=0xd3,
                0xd7..=0xd7,
                0xf5..=0xfe,
            ],
            &[
                0x40..=0x4f,
                0x90..=0x9f,
                0xa3..=0xa5,
                0xab..=0xad,
                0xaf..=0xb1,
                0xb3..=0xb3,
                0xb6..=0xb7,
                0xba..=0xc1,
                0xc7..=0xcf,
            ],
        ],
        30_000,
    );
}

#[test]
fn legacy_stack_and_branches() {
    check(
        "32-bit stack and branches",
        32,
        &[
            &[
                0x50..=0x61,
                0x68..=0x68,
                0x6a..=0x6a,
                0x70..=0x7f,
                0x8f..=0x8f,
                0xc2..=0xc3,
                0xc8..=0xc9,
                0xe0..=0xe3,
                0xe8..=0xe9,
                0xeb..=0xeb,
                0xff..=0xff,
            ],
            &[0x80..=0x8f],
        ],
        20_000,
    );
}

#[test]
fn legacy_strings() {
    check("32-bit strings", 32, &[&[0xa4..=0xa7, 0xaa..=0xaf]], 10_000);
}

#[test]
fn decimal_and_bound() {
    check(
        "decimal",
        32,
        &[&[
            0x27..=0x27,
            0x2f..=0x2f,
            0x37..=0x37,
            0x3f..=0x3f,
            0x62..=0x62,
            0xd4..=0xd6,
        ]],
        20_000,
    );
}
