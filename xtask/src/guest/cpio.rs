//! Writer of cpio archives in the "newc" format, which the kernel unpacks as its first root filesystem
//! (Linux, Documentation/driver-api/early-userspace/buffer-format.rst).

/// What a name in the archive is.
pub enum Node<'a> {
    Directory,
    /// An executable or plain file with these permissions.
    File {
        mode: u32,
        data: &'a [u8],
    },
    Symlink(&'a str),
    CharDevice {
        major: u32,
        minor: u32,
    },
}

const S_IFDIR: u32 = 0o040000;
const S_IFREG: u32 = 0o100000;
const S_IFLNK: u32 = 0o120000;
const S_IFCHR: u32 = 0o020000;

/// An archive being written.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// Adds one entry. Parent directories must have been added before it.
    pub fn add(&mut self, path: &str, node: &Node) {
        match node {
            Node::Directory => self.entry(path, S_IFDIR | 0o755, (0, 0), &[]),
            Node::File { mode, data } => self.entry(path, S_IFREG | mode, (0, 0), data),
            Node::Symlink(target) => self.entry(path, S_IFLNK | 0o777, (0, 0), target.as_bytes()),
            Node::CharDevice { major, minor } => {
                self.entry(path, S_IFCHR | 0o600, (*major, *minor), &[]);
            }
        }
    }

    /// Ends the archive and returns its bytes.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), data: &[u8]) {
        self.entries += 1;
        let links = if mode & S_IFDIR == S_IFDIR { 2 } else { 1 };
        let fields = [
            self.entries,
            mode,
            0, // uid
            0, // gid
            links,
            0, // mtime: the archive depends on its contents alone
            u32::try_from(data.len()).expect("a file under 4 GiB"),
            0, // device the file was on
            0,
            device.0,
            device.1,
            path.len() as u32 + 1,
            0, // checksum, unused in this format
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(data);
        self.align();
    }

    fn align(&mut self) {
        let padded = self.bytes.len().next_multiple_of(4);
        self.bytes.resize(padded, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_end_with_the_trailer() {
        let mut archive = Archive::default();
        archive.add("bin", &Node::Directory);
        archive.add(
            "bin/x",
            &Node::File {
                mode: 0o755,
                data: b"hello",
            },
        );
        archive.add("bin/y", &Node::Symlink("x"));
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        assert_eq!(&bytes[..6], b"070701");
        // inode 1, directory 0755, two links
        assert_eq!(&bytes[6..14], b"00000001");
        assert_eq!(&bytes[14..22], b"000041ED");
        assert_eq!(&bytes[38..46], b"00000002");
        let text = String::from_utf8_lossy(&bytes);
        assert!(text.contains("bin/x\0"));
        assert!(text.trim_end_matches('\0').ends_with("TRAILER!!!"));
    }
}
