//! The memory of whoever issues an ioctl: arguments are copied in and out of it, and a pointer that
//! leads nowhere is EFAULT.

use anykvm_abi::Plain;

use crate::error::{Errno, Result};

/// The pointer leads nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("bad user address")]
pub struct Efault;

/// Memory that ioctl arguments point into.
pub trait UserMemory {
    /// Copies out of it, all or an error.
    fn read(&self, address: u64, buf: &mut [u8]) -> std::result::Result<(), Efault>;
    /// Copies into it. After an error part of the data may have been written.
    fn write(&self, address: u64, buf: &[u8]) -> std::result::Result<(), Efault>;
}

impl dyn UserMemory + '_ {
    /// Copies a structure in.
    pub fn get<T: Plain>(&self, address: u64) -> Result<T> {
        let mut value = T::zeroed();
        self.read(address, value.as_bytes_mut())?;
        Ok(value)
    }

    /// Copies a structure out.
    pub fn put<T: Plain>(&self, address: u64, value: &T) -> Result<()> {
        Ok(self.write(address, value.as_bytes())?)
    }

    /// Copies an array of `count` elements in, at most `limit` of them (else E2BIG).
    pub fn get_array<T: Plain>(&self, address: u64, count: usize, limit: usize) -> Result<Vec<T>> {
        if count > limit {
            return Err(Errno::E2BIG);
        }
        let mut values = Vec::with_capacity(count);
        for i in 0..count {
            values.push(self.get(address.wrapping_add((i * size_of::<T>()) as u64))?);
        }
        Ok(values)
    }

    /// Copies an array out.
    pub fn put_array<T: Plain>(&self, address: u64, values: &[T]) -> Result<()> {
        for (i, value) in values.iter().enumerate() {
            self.put(address.wrapping_add((i * size_of::<T>()) as u64), value)?;
        }
        Ok(())
    }
}

/// No memory at all: for ioctls whose argument is not a pointer.
#[derive(Clone, Copy, Debug)]
pub struct NoMemory;

impl UserMemory for NoMemory {
    fn read(&self, _: u64, _: &mut [u8]) -> std::result::Result<(), Efault> {
        Err(Efault)
    }
    fn write(&self, _: u64, _: &[u8]) -> std::result::Result<(), Efault> {
        Err(Efault)
    }
}
