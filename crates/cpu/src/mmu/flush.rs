//! What invalidates cached translations (SDM Vol. 3, 4.10.4): called by the instructions that do.
//! Each also voids the jump-cache entries that rested on them.

use crate::cpu::Cpu;
use crate::state::cr4;

impl Cpu {
    /// The current PCID, 0 without CR4.PCIDE.
    fn pcid(&self) -> u16 {
        if self.state.cr4 & cr4::PCIDE != 0 {
            (self.state.cr3 & 0xfff) as u16
        } else {
            0
        }
    }

    /// MOV to CR3 has loaded `state.cr3`. `keep`: bit 63 of the source was set with CR4.PCIDE, so
    /// what is cached for the PCID stays good.
    pub(crate) fn address_space_changed(&mut self, keep: bool) {
        self.tlb.switch(self.pcid(), keep);
        self.space_changed();
    }

    /// What is found at a RIP holds as long as the translation of the page may be cached: for
    /// supervisor code on global pages in every address space.
    pub(crate) fn choose_code_space(&mut self) {
        let everywhere = !self.mode.user() && !self.local_code;
        let space = if everywhere { 0 } else { self.tlb.asn() };
        self.blocks.set_mode(self.mode, space);
    }

    /// Supervisor code was found on a page that is not global: until everything is flushed supervisor
    /// code is found anew in each address space.
    pub(crate) fn note_local_code(&mut self) {
        self.local_code = true;
        self.choose_code_space();
    }

    fn space_changed(&mut self) {
        if self.tlb.numbers_were_used_up() {
            self.local_code = false;
            self.blocks.forget_jumps();
        }
        self.choose_code_space();
        self.leave_block();
    }

    /// Drops every translation, global ones too.
    pub(crate) fn flush_tlb(&mut self) {
        self.tlb.flush_all();
        self.blocks.forget_jumps();
        self.local_code = false;
        self.choose_code_space();
        self.leave_block();
    }

    /// Drops every translation but global ones, in all address spaces.
    pub(crate) fn flush_tlb_non_global(&mut self) {
        self.tlb.flush_non_global(self.pcid());
        self.space_changed();
    }

    /// Drops the translations of one PCID but global ones.
    pub(crate) fn flush_tlb_pcid(&mut self, pcid: u16) {
        self.tlb.flush_pcid(pcid, pcid == self.pcid());
        self.space_changed();
    }

    /// INVLPG: drops the translations of one page, in every address space.
    pub(crate) fn flush_tlb_page(&mut self, linear: u64) {
        if self.tlb.invalidate(linear) {
            self.blocks.forget_jumps();
        } else {
            self.blocks.forget_jumps_of_page(linear);
        }
        self.leave_block();
    }

    /// Access rights changed (CR4.SMAP and the like): translations stay, fast entries go.
    pub(crate) fn flush_tlb_rights(&mut self) {
        self.tlb.flush_l1();
        self.blocks.forget_jumps();
        self.leave_block();
    }
}
