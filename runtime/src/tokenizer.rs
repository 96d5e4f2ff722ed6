//! Text to token ids and back, and text as it streams.
//!
//! The vocabulary is parsed when it is first needed, and never for token ids alone. Only byte-level tokenizers are taken (all
//! published Qwen models have one), so that a stream can hand out text as soon as its bytes form characters.

use std::sync::OnceLock;

use tokenizers::DecoderWrapper;

/// Why text and tokens cannot be converted.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// There are no tokenizer files in the executable.
    #[error(
        "this executable has no tokenizer: the model's folder had no `tokenizer.json` when it was built; give token ids with `--tokens`"
    )]
    Absent,
    /// `tokenizer.json` does not parse.
    #[error("tokenizer.json: {reason}")]
    Parse {
        /// What the parser says.
        reason: String,
    },
    /// It is not byte-level.
    #[error("tokenizer.json: the decoder is {found}, expected `ByteLevel`")]
    Decoder {
        /// What it is instead.
        found: String,
    },
    /// A text cannot be encoded, or ids not decoded.
    #[error("tokenizer: {reason}")]
    Convert {
        /// What the tokenizer says.
        reason: String,
    },
}

/// What becomes of special tokens (`<|im_end|>`) in text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Special {
    /// They stand in the text.
    Keep,
    /// They are left out.
    Skip,
}

/// A byte-level tokenizer.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
}

impl Tokenizer {
    /// Reads the text of a `tokenizer.json`.
    /// # Errors
    /// [`TokenizerError`] if it does not parse or is not byte-level.
    pub fn from_json(json: &[u8]) -> Result<Self, TokenizerError> {
        let inner = tokenizers::Tokenizer::from_bytes(json)
            .map_err(|error| TokenizerError::Parse { reason: error.to_string() })?;
        match inner.get_decoder() {
            Some(DecoderWrapper::ByteLevel(_)) => Ok(Self { inner }),
            Some(other) => Err(TokenizerError::Decoder { found: kind_of(other) }),
            None => Err(TokenizerError::Decoder { found: "missing".to_owned() }),
        }
    }

    /// The ids of `text`; special tokens that stand in it are recognised, none is added.
    /// # Errors
    /// [`TokenizerError::Convert`] if the tokenizer refuses the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.inner.encode_fast(text, false).map_err(convert)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of `ids`; bytes that are no UTF-8 become U+FFFD.
    /// # Errors
    /// [`TokenizerError::Convert`] if the tokenizer refuses them.
    pub fn decode(&self, ids: &[u32], special: Special) -> Result<String, TokenizerError> {
        self.inner.decode(ids, special == Special::Skip).map_err(convert)
    }

    /// The id of a token, written as it stands in the vocabulary.
    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Ids that have a token.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The bytes that `id` stands for; none for an id without a token, or a special one that is skipped.
    fn bytes_of(&self, id: u32, special: Special) -> Vec<u8> {
        let Some(token) = self.inner.id_to_token(id) else { return Vec::new() };
        if special == Special::Skip && self.inner.get_added_vocabulary().is_special_token(&token) {
            return Vec::new();
        }
        let bytes: Option<Vec<u8>> = token.chars().map(byte_of).collect();
        bytes.unwrap_or_else(|| token.into_bytes())
    }
}

fn convert(error: tokenizers::Error) -> TokenizerError {
    TokenizerError::Convert { reason: error.to_string() }
}

/// The name of a decoder as `tokenizer.json` spells it.
fn kind_of(decoder: &DecoderWrapper) -> String {
    let value = serde_json::to_value(decoder).unwrap_or_default();
    format!("`{}`", value["type"].as_str().unwrap_or("unknown"))
}

/// The byte that a character of a byte-level vocabulary stands for: printable Latin-1 is itself, the other 68 bytes are the
/// characters from U+0100 on, in order.
fn byte_of(c: char) -> Option<u8> {
    let shifted = |n: u32| match n {
        0..=32 => n,
        33..=66 => n - 33 + 0x7f,
        _ => 0xad,
    };
    match u32::from(c) {
        n @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => u8::try_from(n).ok(),
        n @ 0x100..=0x143 => u8::try_from(shifted(n - 0x100)).ok(),
        _ => None,
    }
}

/// Text from a stream of ids: each push gives the text that is complete. Bytes of a character that further tokens may
/// complete are held back.
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    special: Special,
    held: Vec<u8>,
}

impl<'a> TextStream<'a> {
    /// An empty stream.
    pub fn new(tokenizer: &'a Tokenizer, special: Special) -> Self {
        Self { tokenizer, special, held: Vec::new() }
    }

    /// Takes one id and gives the text that it completes.
    pub fn push(&mut self, id: u32) -> String {
        self.held.extend(self.tokenizer.bytes_of(id, self.special));
        take_complete(&mut self.held)
    }

    /// Ends the stream: bytes still held are no character any more.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.held)).into_owned()
    }
}

/// Takes the complete characters off the front of `held`, at most three bytes stay; what can become no character is U+FFFD.
fn take_complete(held: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut rest = held.as_slice();
    loop {
        match std::str::from_utf8(rest) {
            Ok(valid) => {
                text.push_str(valid);
                rest = &[];
                break;
            }
            Err(error) => {
                let (valid, after) = rest.split_at(error.valid_up_to());
                text.push_str(&String::from_utf8_lossy(valid));
                rest = after;
                let Some(bad) = error.error_len() else { break };
                text.push(char::REPLACEMENT_CHARACTER);
                rest = &rest[bad..];
            }
        }
    }
    let kept = rest.len();
    held.drain(..held.len() - kept);
    text
}

/// A tokenizer that is read when it is first asked for.
pub struct LazyTokenizer<'a> {
    json: Option<&'a [u8]>,
    cell: OnceLock<Tokenizer>,
}

impl<'a> LazyTokenizer<'a> {
    /// From the text of `tokenizer.json`, if there is one.
    pub const fn new(json: Option<&'a [u8]>) -> Self {
        Self { json, cell: OnceLock::new() }
    }

    /// True if there is one.
    pub const fn is_present(&self) -> bool {
        self.json.is_some()
    }

    /// The tokenizer.
    /// # Errors
    /// [`TokenizerError`] if there is none, or it does not parse.
    pub fn get(&self) -> Result<&Tokenizer, TokenizerError> {
        if let Some(tokenizer) = self.cell.get() {
            return Ok(tokenizer);
        }
        let tokenizer = Tokenizer::from_json(self.json.ok_or(TokenizerError::Absent)?)?;
        Ok(self.cell.get_or_init(|| tokenizer))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::path::{Path, PathBuf};

    fn demo() -> Tokenizer {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/demo-model/tokenizer.json");
        Tokenizer::from_json(&std::fs::read(path).unwrap()).unwrap()
    }

    /// Texts and ids recorded from the published tokenizer; 11 MB, so they lie beside the repository and may be absent.
    pub(crate) fn published() -> Option<(PathBuf, serde_json::Value)> {
        let dir = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/oracle/tokenizer"));
        let dir = std::env::var_os("NEXTC_TOKENIZER_CASES").map_or(dir.to_owned(), PathBuf::from);
        if !dir.is_dir() {
            println!("skipped: no tokenizer cases at {}", dir.display());
            return None;
        }
        let cases = std::fs::read(dir.join("tokenizer_cases.json")).unwrap();
        Some((dir, serde_json::from_slice(&cases).unwrap()))
    }

    fn ids(value: &serde_json::Value) -> Vec<u32> {
        value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
    }

    fn streamed(tokenizer: &Tokenizer, ids: &[u32], special: Special) -> String {
        let mut stream = TextStream::new(tokenizer, special);
        let mut text: String = ids.iter().map(|&id| stream.push(id)).collect();
        text.push_str(&stream.finish());
        text
    }

    #[test]
    fn published_cases_encode_and_decode_as_recorded() {
        let Some((dir, cases)) = published() else { return };
        let tokenizer = Tokenizer::from_json(&std::fs::read(dir.join("tokenizer.json")).unwrap()).unwrap();
        let encode = cases["encode"].as_array().unwrap();
        assert!(encode.len() >= 200);
        for case in encode {
            let text = case["text"].as_str().unwrap();
            assert_eq!(tokenizer.encode(text).unwrap(), ids(&case["ids"]), "{text:?}");
            let back = case["decoded"].as_str().unwrap_or(text);
            assert_eq!(tokenizer.decode(&ids(&case["ids"]), Special::Keep).unwrap(), back);
            assert_eq!(streamed(&tokenizer, &ids(&case["ids"]), Special::Keep), back);
        }
        for case in cases["decode"].as_array().unwrap() {
            let ids = ids(&case["ids"]);
            for (special, key) in [(Special::Keep, "text"), (Special::Skip, "text_skip_special")] {
                assert_eq!(tokenizer.decode(&ids, special).unwrap(), case[key].as_str().unwrap());
                assert_eq!(streamed(&tokenizer, &ids, special), case[key].as_str().unwrap());
            }
        }
    }

    #[test]
    fn demo_prompts_have_their_golden_ids() {
        let tokenizer = demo();
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/demo-model/golden_greedy.json");
        let golden: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        for case in golden.as_array().unwrap() {
            assert_eq!(tokenizer.encode(case["prompt"].as_str().unwrap()).unwrap(), ids(&case["prompt_ids"]));
            let text = case["text"].as_str().unwrap();
            assert_eq!(streamed(&tokenizer, &ids(&case["greedy_ids"]), Special::Keep), text);
        }
    }

    #[test]
    fn every_byte_has_its_character() {
        let mut seen = [false; 256];
        for c in (0..0x200).filter_map(char::from_u32) {
            if let Some(byte) = byte_of(c) {
                assert!(!std::mem::replace(&mut seen[usize::from(byte)], true), "{c:?}");
            }
        }
        assert!(seen.iter().all(|&s| s));
        assert_eq!(byte_of('Ġ'), Some(b' '));
        assert_eq!(byte_of('Ċ'), Some(b'\n'));
    }

    #[test]
    fn a_character_split_over_tokens_is_held_back() {
        let tokenizer = demo();
        let ids = tokenizer.encode("a🙏漢").unwrap();
        let mut stream = TextStream::new(&tokenizer, Special::Keep);
        let parts: Vec<String> = ids.iter().map(|&id| stream.push(id)).collect();
        assert!(parts.iter().all(|p| !p.contains('\u{fffd}')), "{parts:?}");
        assert_eq!(parts.concat(), "a🙏漢");
        assert!(ids.len() > 3, "the demo vocabulary has no token for these characters: {ids:?}");
    }

    #[test]
    fn broken_bytes_are_replaced_as_at_once() {
        for bytes in
            [&b"a\xffb"[..], b"\xe6\xbc", b"\xe6\xbca", b"\xf0\x9f\x99\xf0\x9f\x99\x8f", b"\xc0\x80", b"\xed\xa0\x80z"]
        {
            let mut held = Vec::new();
            let mut text = String::new();
            for &byte in bytes {
                held.push(byte);
                text.push_str(&take_complete(&mut held));
                assert!(held.len() <= 3);
            }
            text.push_str(&String::from_utf8_lossy(&held));
            assert_eq!(text, String::from_utf8_lossy(bytes));
        }
    }

    #[test]
    fn special_tokens_are_recognised_and_skipped() {
        let tokenizer = demo();
        let ids = tokenizer.encode("<|im_start|>user").unwrap();
        assert_eq!(ids[0], tokenizer.id_of("<|im_start|>").unwrap());
        assert_eq!(streamed(&tokenizer, &ids, Special::Skip), "user");
        assert_eq!(streamed(&tokenizer, &ids, Special::Keep), "<|im_start|>user");
        assert_eq!(streamed(&tokenizer, &[4_000_000], Special::Keep), "");
    }

    #[test]
    fn bad_files_are_named() {
        let check = |json: Option<&[u8]>, expected: &str| {
            let error = LazyTokenizer::new(json).get().err().unwrap().to_string();
            assert!(error.contains(expected), "{error}");
        };
        check(None, "no `tokenizer.json`");
        check(Some(b"{"), "tokenizer.json: ");
        check(Some(b"\xff\xfe"), "tokenizer.json: ");
        let no_decoder = br#"{"version":"1.0","added_tokens":[],"model":{"type":"BPE","vocab":{"a":0},"merges":[]}}"#;
        check(Some(no_decoder), "the decoder is missing, expected `ByteLevel`");
    }
}
