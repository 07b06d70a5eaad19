//! irqchip
