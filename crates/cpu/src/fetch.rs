//! From RIP to decoded instructions: finding, checking and making blocks, and fetching single
//! instructions that are in none.

use crate::block::{Block, BlockId, MAX_INSNS};
use crate::cpu::Cpu;
use crate::decode::{self, DecodeError, Insn, MAX_INSN_LEN};
use crate::exit::Stop;
use crate::memory::PAGE;
use crate::memory::access::HostPage;
use crate::mmu::slow::Fetched;
use crate::requests;
use crate::state::{cr0, seg};

impl Cpu {
    /// The block at RIP, checked; `None` if the instruction there must be executed alone (it
    /// crosses a page or the code segment's limit).
    #[inline]
    pub(crate) fn block_at(&mut self, rip: u64) -> Result<Option<BlockId>, Stop> {
        let code = self.memory.pages().code_epoch();
        if let Some(id) = self.blocks.jump(rip, code)
            && (self.paging() || self.blocks.matches_memory(id))
        {
            return Ok(Some(id));
        }
        if self.blocks.has_crossing(rip, code) {
            return Ok(None);
        }
        self.block_slow(rip, code)
    }

    #[inline(never)]
    fn block_slow(&mut self, rip: u64, code: u64) -> Result<Option<BlockId>, Stop> {
        let linear = self.code_linear(rip, 1)?;
        let Fetched::Ram(page) = self.fetch_page(linear)? else {
            return Ok(None);
        };
        let offset = (linear % PAGE) as usize;
        let host = page.0 + offset as u64;
        let id = match self.blocks.find(host, self.mode) {
            Some(id) if self.check_block(id, page, offset)? => id,
            found => match self.build_block(page, offset)? {
                Some(block) => {
                    self.counters.decoded += 1;
                    self.counters.redecoded += u64::from(found.is_some());
                    self.blocks.insert(block, self.mode)
                }
                None => return Ok(None),
            },
        };
        // The limit is not in the key, so it is checked for each entry by this path.
        let len = self.blocks.get(id).map_or(0, |b| b.bytes.len());
        if !self.mode.flat() && !self.within_code_limit(rip, len) {
            return Ok(None);
        }
        if self.limit_implied() {
            self.blocks.remember(rip, code, id);
        }
        Ok(Some(id))
    }

    /// CR0.PG.
    #[inline(always)]
    fn paging(&self) -> bool {
        self.state.cr0 & cr0::PG != 0
    }

    /// Whether no instruction can lie beyond the code segment's limit, which no key holds.
    fn limit_implied(&self) -> bool {
        self.mode.code64() || self.mode.flat()
    }

    /// Whether an instruction found at a RIP stays good until a flush, an epoch or a store into
    /// code: the limit need not be checked, and paging is on.
    pub(crate) fn cacheable_by_rip(&self) -> bool {
        self.limit_implied() && self.paging()
    }

    pub(crate) fn within_code_limit(&self, rip: u64, len: usize) -> bool {
        let last = rip.wrapping_add(len as u64).wrapping_sub(1);
        self.mode.code64() || last <= u64::from(self.state.seg[usize::from(seg::CS)].limit)
    }

    /// Linear address of code bytes; #GP(0) beyond the limit.
    pub(crate) fn code_linear(&mut self, rip: u64, len: usize) -> Result<u64, Stop> {
        if self.mode.code64() {
            return Ok(rip);
        }
        if !self.within_code_limit(rip, len) {
            return Err(self.gp0());
        }
        let linear = self.state.seg[usize::from(seg::CS)].base.wrapping_add(rip);
        Ok(linear & 0xffff_ffff)
    }

    /// Whether a block's bytes are still in memory.
    fn check_block(&mut self, id: BlockId, page: HostPage, offset: usize) -> Result<bool, Stop> {
        let Some(len) = self.blocks.get(id).map(|block| block.bytes.len()) else {
            return Ok(false);
        };
        self.mark_code(page, offset, len)?;
        let block = self.blocks.get(id);
        Ok(block.is_some_and(|block| page.matches(offset, &block.bytes)))
    }

    /// Notes that these bytes of a page are about to be read as code. An error if requests are to be
    /// served first: then nothing may be read or executed by what was found so far.
    pub(crate) fn mark_code(
        &mut self,
        page: HostPage,
        offset: usize,
        len: usize,
    ) -> Result<(), Stop> {
        if let Some(record) = self.memory.pages().get(page.0)
            && record.mark_code(offset, len)
        {
            return self.protect_code_page(page);
        }
        Ok(())
    }

    /// A page got its first code: no processor may keep a fast write entry for it. While this one waits for
    /// the others they do not wait for it, so what they have asked for is still to be done: TLB entries
    /// and the memory map must not be used any more.
    fn protect_code_page(&mut self, page: HostPage) -> Result<(), Stop> {
        self.tlb.protect_host_page(page.0);
        self.memory
            .clone()
            .synchronise(requests::CODE_PAGE, Some(&self.participant.clone()));
        if self.asked_to_drop() {
            return Err(Stop::Exit);
        }
        Ok(())
    }

    /// Whether entries of the TLB or the memory map are to be dropped before anything is executed.
    pub(crate) fn asked_to_drop(&self) -> bool {
        const DROPS: u32 = requests::TLB_FLUSH | requests::MEMSLOTS | requests::CODE_PAGE;
        self.requests.pending() & DROPS != 0
    }

    pub(crate) fn build_block(
        &mut self,
        page: HostPage,
        offset: usize,
    ) -> Result<Option<Block>, Stop> {
        let mut bytes = [0; MAX_INSNS * MAX_INSN_LEN];
        let want = bytes.len().min(PAGE as usize - offset);
        self.mark_code(page, offset, want)?;
        let have = page.read(offset, &mut bytes[..want]);
        let mut insns = Vec::with_capacity(8);
        let mut at = 0;
        while insns.len() < MAX_INSNS {
            match decode::decode(&bytes[at..have], self.mode) {
                Ok(insn) => {
                    at += usize::from(insn.len);
                    let ends = insn.ends_block;
                    insns.push(insn);
                    if ends {
                        break;
                    }
                }
                Err(_) => break,
            }
        }
        if insns.is_empty() {
            return Ok(None);
        }
        Ok(Some(Block {
            insns: insns.into_boxed_slice(),
            bytes: bytes[..at].into(),
            host: page.0 + offset as u64,
            heat: 0,
        }))
    }

    /// Fetches and decodes the instruction at RIP without the cache.
    pub(crate) fn fetch(&mut self) -> Result<Insn, Stop> {
        let rip = self.state.rip();
        let linear = self.code_linear(rip, 1)?;
        let mut bytes = [0; MAX_INSN_LEN];
        let Fetched::Ram(page) = self.fetch_page(linear)? else {
            return Err(Stop::Unimplemented);
        };
        self.mark_code(page, (linear % PAGE) as usize, MAX_INSN_LEN)?;
        let mut have = page.read((linear % PAGE) as usize, &mut bytes);
        loop {
            match decode::decode(&bytes[..have], self.mode) {
                Ok(insn) => {
                    self.code_linear(rip, insn.len.into())?;
                    return Ok(insn);
                }
                Err(DecodeError::Incomplete) if have < MAX_INSN_LEN => {
                    let next = self.code_linear(rip.wrapping_add(have as u64), 1)?;
                    let Fetched::Ram(page) = self.fetch_page(next)? else {
                        return Err(Stop::Unimplemented);
                    };
                    self.mark_code(page, (next % PAGE) as usize, MAX_INSN_LEN - have)?;
                    have += page.read((next % PAGE) as usize, &mut bytes[have..]);
                }
                Err(DecodeError::TooLong | DecodeError::Incomplete) => return Err(self.gp0()),
                Err(DecodeError::Invalid) => return Err(self.ud()),
                Err(DecodeError::Unimplemented(_)) => return Err(Stop::Unimplemented),
            }
        }
    }

    /// The bytes at RIP, as many as can be read without a fault, for reports.
    pub(crate) fn instruction_bytes(&mut self, rip: u64) -> ([u8; MAX_INSN_LEN], usize) {
        let mut bytes = [0; MAX_INSN_LEN];
        let mut have = 0;
        while have < MAX_INSN_LEN {
            let Ok(linear) = self.code_linear(rip.wrapping_add(have as u64), 1) else {
                break;
            };
            let Ok(Fetched::Ram(page)) = self.fetch_page(linear) else {
                break;
            };
            have += page.read((linear % PAGE) as usize, &mut bytes[have..]);
        }
        (bytes, have)
    }
}
