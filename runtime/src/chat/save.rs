//! A chat in a file: a mark, a header of JSON, the model's state, and the BLAKE3 hash of all that.
//!
//! Files appear whole or not at all. A file is checked to its last byte before anything of it is taken over.

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::conversation::Conversation;
use super::error::ChatError;
use super::model::ChatModel;
use super::session::Session;

const MARK: &[u8; 16] = b"nextc chat, v1\n\0";
const HASH_BYTES: u64 = 32;
/// More would be no header.
const MAX_HEADER_BYTES: u64 = 1 << 30;

#[derive(Serialize, Deserialize)]
struct Header {
    model: String,
    fingerprint: String,
    /// What the sequence has been fed.
    tokens: Vec<u32>,
    state_bytes: u64,
    seed: u64,
    conversation: Conversation,
}

/// What was loaded, beside the state.
#[derive(Debug)]
pub struct Loaded {
    /// What has been said.
    pub conversation: Conversation,
    /// Seed of the random numbers.
    pub seed: u64,
}

/// Writes a chat, and gives the file's length in bytes.
/// # Errors
/// [`ChatError::File`]; the file is as it was before.
pub fn save<M: ChatModel>(
    path: &Path,
    session: &Session<M>,
    conversation: &Conversation,
    seed: u64,
) -> Result<u64, ChatError> {
    let file_error = |error| ChatError::File { path: path.to_owned(), error };
    let model = session.model();
    let header = Header {
        model: model.name().to_owned(),
        fingerprint: model.fingerprint().to_owned(),
        tokens: session.fed().to_vec(),
        state_bytes: model.state_bytes(),
        seed,
        conversation: conversation.clone(),
    };
    let header = serde_json::to_vec(&header).map_err(|e| file_error(e.into()))?;
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let write = || -> io::Result<u64> {
        let aside = tempfile::Builder::new().prefix(".nextc-chat-").tempfile_in(folder)?;
        let mut out = Hashed::new(io::BufWriter::new(aside));
        out.write_all(MARK)?;
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        model.write_state(&mut out)?;
        let (mut out, hash, bytes) = out.finish();
        out.write_all(&hash)?;
        let aside = out.into_inner().map_err(io::IntoInnerError::into_error)?;
        aside.as_file().sync_all()?;
        aside.persist(path).map_err(|e| e.error)?;
        File::open(folder)?.sync_all()?;
        Ok(bytes + HASH_BYTES)
    };
    write().map_err(file_error)
}

/// Reads a chat into a session.
/// # Errors
/// [`ChatError`] if the file is damaged, or of another model; the session is as it was, but for errors of reading that appear
/// after the whole file was checked, which leave it empty.
pub fn load<M: ChatModel>(path: &Path, session: &mut Session<M>) -> Result<Loaded, ChatError> {
    let file_error = |error| ChatError::File { path: path.to_owned(), error };
    let (header, state_bytes) = check(path)?;
    let header: Header = serde_json::from_slice(&header).map_err(|e| damaged(path, e.to_string()))?;
    fits(path, &header, state_bytes, session.model())?;
    let mut file = BufReader::new(File::open(path).map_err(file_error)?);
    let read = read_head(&mut file).map_err(file_error)?;
    read.ok_or_else(|| damaged(path, "changed while it was read".to_owned()))?;
    let count = header.tokens.len();
    let result = session.replace(header.tokens, |model| model.read_state(count, &mut file))?;
    result.map_err(file_error)?;
    Ok(Loaded { conversation: header.conversation, seed: header.seed })
}

/// Reads the whole file once; gives its header and the bytes of its state.
fn check(path: &Path) -> Result<(Vec<u8>, u64), ChatError> {
    let file_error = |error| ChatError::File { path: path.to_owned(), error };
    let file = File::open(path).map_err(file_error)?;
    let length = file.metadata().map_err(file_error)?.len();
    let least = MARK.len() as u64 + 8 + HASH_BYTES;
    let mut begin = [0; MARK.len()];
    if length < begin.len() as u64 || (&file).read_exact(&mut begin).is_err() || begin != *MARK {
        return Err(ChatError::NotAChat { path: path.to_owned(), found: "another kind of file" });
    }
    if length < least {
        return Err(damaged(path, format!("{length} B, cut short")));
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update(&begin);
    let mut rest = BufReader::with_capacity(1 << 20, (&file).take(length - HASH_BYTES - begin.len() as u64));
    io::copy(&mut rest, &mut hasher).map_err(file_error)?;
    let mut stored = [0; HASH_BYTES as usize];
    (&file).read_exact(&mut stored).map_err(file_error)?;
    if blake3::Hash::from_bytes(stored) != hasher.finalize() {
        return Err(damaged(path, "its checksum does not match its contents; it was changed or cut short".to_owned()));
    }
    let mut again = BufReader::new(File::open(path).map_err(file_error)?);
    let header = read_head(&mut again).map_err(file_error)?.ok_or_else(|| damaged(path, "bad header".to_owned()))?;
    let head_bytes = least + header.len() as u64;
    let state_bytes = length.checked_sub(head_bytes).ok_or_else(|| damaged(path, "bad header".to_owned()))?;
    Ok((header, state_bytes))
}

/// Reads mark and header; none if they are no such.
fn read_head(file: &mut dyn Read) -> io::Result<Option<Vec<u8>>> {
    let (mut mark, mut length) = ([0; MARK.len()], [0; 8]);
    file.read_exact(&mut mark)?;
    file.read_exact(&mut length)?;
    let length = u64::from_le_bytes(length);
    if mark != *MARK || length > MAX_HEADER_BYTES {
        return Ok(None);
    }
    let mut header = Vec::new();
    file.take(length).read_to_end(&mut header)?;
    Ok((header.len() as u64 == length).then_some(header))
}

/// Refuses what is not this model's, or contradicts itself.
fn fits<M: ChatModel>(path: &Path, header: &Header, state_bytes: u64, model: &M) -> Result<(), ChatError> {
    if header.fingerprint != model.fingerprint() {
        return Err(ChatError::OtherModel {
            path: path.to_owned(),
            found: header.model.clone(),
            found_fingerprint: short(&header.fingerprint),
            name: model.name().to_owned(),
            fingerprint: short(model.fingerprint()),
        });
    }
    if state_bytes != header.state_bytes {
        return Err(damaged(path, format!("{state_bytes} B of state, expected {}", header.state_bytes)));
    }
    let unknown = header.tokens.iter().any(|&t| t as usize >= model.vocab_size());
    if unknown || header.tokens.len() > model.max_context() {
        return Err(damaged(path, "its tokens do not fit the model".to_owned()));
    }
    Ok(())
}

fn short(fingerprint: &str) -> String {
    fingerprint.chars().take(16).collect()
}

fn damaged(path: &Path, reason: String) -> ChatError {
    ChatError::Damaged { path: path.to_owned(), reason }
}

/// A writer that hashes what it is given.
struct Hashed<W> {
    inner: W,
    hasher: blake3::Hasher,
    bytes: u64,
}

impl<W: Write> Hashed<W> {
    fn new(inner: W) -> Self {
        Self { inner, hasher: blake3::Hasher::new(), bytes: 0 }
    }

    fn finish(self) -> (W, [u8; 32], u64) {
        (self.inner, *self.hasher.finalize().as_bytes(), self.bytes)
    }
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
