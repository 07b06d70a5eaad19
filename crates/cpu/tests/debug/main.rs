//! Debug facilities as tables of cases (SDM Vol. 3, ch. 18; section numbers stand in the rows).

#[path = "../harness/mod.rs"]
mod harness;

mod breakpoints;
mod machine;
mod registers;
mod resume;
mod single_step;
mod stack_segment;
