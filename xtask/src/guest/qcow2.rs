//! An empty disk image that can hold snapshots (QEMU: docs/interop/qcow2.txt, version 3).

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result};

const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// Header, reference-count table, block of reference counts, level-1 table: a cluster each.
const CLUSTERS: u64 = 4;
const HEADER_LENGTH: u32 = 104;
/// log2 of the bits of a reference count.
const REFCOUNT_ORDER: u32 = 4;

/// Writes an image of a disk of `size` bytes, which reads as zeroes.
pub fn create(path: &Path, size: u64) -> Result<()> {
    // A cluster of the level-2 table leads to this many clusters of the disk.
    let reach = CLUSTER / 8 * CLUSTER;
    let l1_entries = size.div_ceil(reach) as u32;
    let mut header = vec![u32::from_be_bytes(*b"QFI\xfb"), 3];
    // No backing file: where its name is, and how long.
    header.extend([0; 3]);
    header.push(CLUSTER_BITS);
    header.extend([(size >> 32) as u32, size as u32]);
    // Not encrypted.
    header.push(0);
    header.push(l1_entries);
    header.extend([0, (3 * CLUSTER) as u32]);
    header.extend([0, CLUSTER as u32]);
    // Clusters of the reference-count table; no snapshots, and none of three sets of features.
    header.push(1);
    header.extend([0; 9]);
    header.extend([REFCOUNT_ORDER, HEADER_LENGTH]);
    let header: Vec<u8> = header.into_iter().flat_map(u32::to_be_bytes).collect();

    let file = File::create(path).with_context(|| path.display().to_string())?;
    file.set_len(CLUSTERS * CLUSTER)?;
    file.write_all_at(&header, 0)?;
    file.write_all_at(&(2 * CLUSTER).to_be_bytes(), CLUSTER)?;
    let counts: Vec<u8> = (0..CLUSTERS).flat_map(|_| 1u16.to_be_bytes()).collect();
    file.write_all_at(&counts, 2 * CLUSTER)?;
    Ok(())
}
