//! What a guest is made of, and how bytes become one. Small counts come first and lists of changes to
//! a working computer follow, so that most inputs run a while and a changed byte changes one thing.

use arbitrary::{Arbitrary, Result, Unstructured};

use crate::layout;

/// The mode that the first instruction is executed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    Real,
    /// Real mode with 4 GiB segments.
    Unreal,
    Virtual8086,
    /// 16-bit protected mode without paging.
    Protected16,
    /// 32-bit protected mode without paging.
    Protected32,
    /// 32-bit paging.
    Paging32,
    /// PAE paging.
    Pae,
    /// Compatibility mode, 4-level paging.
    Compatibility,
    /// 64-bit mode, 4-level paging.
    Long,
    /// 64-bit mode, 5-level paging.
    Long57,
}

const STARTS: [Start; 10] = [
    Start::Real,
    Start::Unreal,
    Start::Virtual8086,
    Start::Protected16,
    Start::Protected32,
    Start::Paging32,
    Start::Pae,
    Start::Compatibility,
    Start::Long,
    Start::Long57,
];

/// A segment register's hidden part, and selector.
#[derive(Clone, Copy, Debug)]
pub struct SegmentChange {
    /// 0-5: ES to GS; 6: LDTR; 7: TR; 8: GDTR; 9: IDTR.
    pub which: u8,
    pub base: u64,
    pub limit: u32,
    pub attr: u32,
    pub selector: u16,
}

/// One guest.
#[derive(Clone, Debug)]
pub struct Input<'a> {
    pub start: Start,
    pub user: bool,
    /// Requests come from another thread, not only between runs.
    pub asynchronous: bool,
    pub rflags: u64,
    /// CR0, CR4, EFER, XCR0: bits to change, as far as they can be.
    pub control: [u64; 4],
    /// General registers, DR0-DR3, DR6, DR7.
    pub registers: Vec<(u8, u64)>,
    pub segments: Vec<SegmentChange>,
    /// 8 bytes at an offset in the descriptor tables and task-state segments.
    pub descriptors: Vec<(u16, u64)>,
    /// An entry of a page table.
    pub entries: Vec<(u16, u64)>,
    /// MSRs, by position in the list of those that are saved.
    pub msrs: Vec<(u8, u64)>,
    /// 8 bytes at an offset in the XSAVE area.
    pub xsave: Vec<(u16, u64)>,
    /// Pending and injected events: see `setup::events`.
    pub events: u64,
    /// The code at the start.
    pub code: &'a [u8],
    /// The code of every exception handler.
    pub handler: &'a [u8],
    /// What devices answer and the owner does; when it ends, zeroes follow.
    pub tape: &'a [u8],
}

/// Numbers near which things change.
fn value(u: &mut Unstructured) -> Result<u64> {
    const PLACES: [u64; 16] = [
        layout::CODE,
        layout::CODE + layout::CODE_SIZE,
        layout::GDT,
        layout::IDT,
        layout::TSS,
        layout::STACK0,
        layout::TABLES,
        layout::RAM_SIZE,
        layout::ROM,
        layout::ROM + layout::ROM_SIZE,
        layout::TOP,
        layout::HIGH,
        layout::HIGH + layout::HIGH_SIZE,
        0x8000_0000_0000,
        0xffff_8000_0000_0000,
        1 << 56,
    ];
    let kind: u8 = u.arbitrary()?;
    Ok(match kind & 7 {
        0 => u.arbitrary()?,
        1 => u.arbitrary::<u8>()?.into(),
        2 => u64::from(u.arbitrary::<u32>()?) % layout::RAM_SIZE,
        3 => (1u64 << (kind >> 3)).wrapping_sub(u.arbitrary::<u8>()?.into()),
        4 => 0u64.wrapping_sub(u.arbitrary::<u8>()?.into()),
        5 => 1 << (u.arbitrary::<u8>()? & 63),
        6 => u64::from(u.arbitrary::<u32>()?),
        _ => {
            let near: i8 = u.arbitrary()?;
            PLACES[usize::from(kind >> 4)].wrapping_add_signed(near.into())
        }
    })
}

fn list<'a, T>(
    u: &mut Unstructured<'a>,
    count: u8,
    mut each: impl FnMut(&mut Unstructured<'a>) -> Result<T>,
) -> Result<Vec<T>> {
    (0..count).map(|_| each(u)).collect()
}

fn bytes<'a>(u: &mut Unstructured<'a>, count: usize) -> Result<&'a [u8]> {
    let count = count.min(u.len());
    u.bytes(count)
}

impl<'a> Arbitrary<'a> for Input<'a> {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let start = STARTS[usize::from(u.arbitrary::<u8>()?) % STARTS.len()];
        let flags: u8 = u.arbitrary()?;
        // How many of each list; most often none.
        let counts: [u8; 6] = u.arbitrary()?;
        let counts = counts.map(|n| if n < 128 { 0 } else { n & 15 });
        let code_len: u8 = u.arbitrary()?;
        let handler_len: u8 = u.arbitrary()?;
        let code = bytes(u, 1 + usize::from(code_len))?;
        let handler = bytes(u, usize::from(handler_len & 15))?;
        let control = if flags & 4 != 0 {
            u.arbitrary()?
        } else {
            [0; 4]
        };
        let rflags = if flags & 8 != 0 { u.arbitrary()? } else { 0 };
        let events = if flags & 16 != 0 { u.arbitrary()? } else { 0 };
        Ok(Self {
            start,
            user: flags & 1 != 0,
            asynchronous: flags & 0xe2 == 0xe2,
            rflags,
            control,
            registers: list(u, counts[0], |u| Ok((u.arbitrary()?, value(u)?)))?,
            segments: list(u, counts[1], |u| {
                Ok(SegmentChange {
                    which: u.arbitrary::<u8>()? % 10,
                    base: value(u)?,
                    limit: value(u)? as u32,
                    attr: u.arbitrary()?,
                    selector: u.arbitrary()?,
                })
            })?,
            descriptors: list(u, counts[2], |u| Ok((u.arbitrary()?, u.arbitrary()?)))?,
            entries: list(u, counts[3], |u| {
                Ok((u.arbitrary()?, value(u)? | u64::from(u.arbitrary::<u8>()?)))
            })?,
            msrs: list(u, counts[4], |u| Ok((u.arbitrary()?, value(u)?)))?,
            xsave: list(u, counts[5], |u| Ok((u.arbitrary()?, u.arbitrary()?)))?,
            events,
            code,
            handler,
            tape: bytes(u, usize::MAX)?,
        })
    }
}
