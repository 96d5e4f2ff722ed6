//! Hashes: BLAKE3 of bytes, and of long byte strings block by block so that many threads can work on one.

/// A BLAKE3 hash.
pub type Hash = [u8; 32];

/// Bytes of a block of [`of_blocks`].
pub const BLOCK_BYTES: u64 = 4 << 20;

/// The hash of `bytes`.
pub fn of(bytes: &[u8]) -> Hash {
    *blake3::hash(bytes).as_bytes()
}

/// The hash of a long byte string: of the hashes of its blocks of [`BLOCK_BYTES`], in order.
pub fn of_blocks(blocks: impl IntoIterator<Item = Hash>) -> Hash {
    let mut hasher = blake3::Hasher::new();
    for block in blocks {
        hasher.update(&block);
    }
    *hasher.finalize().as_bytes()
}

/// The hash of parts, each preceded by its length.
pub fn of_parts<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> Hash {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    *hasher.finalize().as_bytes()
}

/// A hash as 64 hexadecimal digits.
pub fn to_hex(hash: &Hash) -> String {
    blake3::Hash::from_bytes(*hash).to_hex().to_string()
}

/// The hash that 64 hexadecimal digits stand for.
pub fn from_hex(text: &str) -> Option<Hash> {
    blake3::Hash::from_hex(text).ok().map(|h| *h.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hex_round_trips_and_parts_are_kept_apart() {
        let hash = of(b"x");
        assert_eq!(from_hex(&to_hex(&hash)), Some(hash));
        assert_eq!(from_hex("12"), None);
        assert_ne!(of_parts([&b"ab"[..], b"c"]), of_parts([&b"a"[..], b"bc"]));
    }
}
