//! Which tokens a draft is chosen from: the frequent ones, and those that were fed lately.
//!
//! Most of a draft's time goes into its head, and a draft that is wrong costs nothing but its time. So its logits are computed for
//! blocks of 16 tokens that are likely: the beginning of the vocabulary, where a tokenizer has the pairs that it merged first, and
//! the blocks of tokens that texts of this model had lately, as texts repeat themselves.

/// Tokens of a block.
const BLOCK: u32 = 16;
/// One of so many tokens, from the first on, is always in it.
const ALWAYS_SHARE: usize = 8;
/// One of so many blocks is in it for a token that was fed lately, at most.
const LATELY_SHARE: usize = 8;

/// Flags for blocks of tokens.
#[derive(Clone, Debug)]
pub(crate) struct Shortlist {
    /// For each block, 1 if it is in the list.
    flags: Vec<i32>,
    /// For each block, when one of its tokens was fed last; 0 for never.
    fed_at: Vec<u64>,
    /// Blocks that are in the list because one of their tokens was fed, and not always.
    lately: usize,
    clock: u64,
}

impl Shortlist {
    /// What is always in the list, of a vocabulary of this size.
    pub fn new(vocab_size: usize) -> Self {
        let blocks = vocab_size.div_ceil(BLOCK as usize);
        let always = blocks.div_ceil(ALWAYS_SHARE);
        let flags = (0..blocks).map(|block| i32::from(block < always)).collect();
        Self { flags, fed_at: vec![0; blocks], lately: 0, clock: 0 }
    }

    /// A flag for each block.
    pub fn flags(&self) -> &[i32] {
        &self.flags
    }

    /// Takes in tokens that were fed; the block that was fed longest ago leaves where there are too many.
    pub fn feed(&mut self, tokens: &[u32]) {
        let blocks = self.flags.len();
        let always = blocks.div_ceil(ALWAYS_SHARE);
        for block in
            tokens.iter().map(|token| (token / BLOCK) as usize).filter(|block| (always..blocks).contains(block))
        {
            self.clock += 1;
            self.fed_at[block] = self.clock;
            if self.flags[block] == 0 {
                self.flags[block] = 1;
                self.lately += 1;
            }
            if self.lately > blocks.div_ceil(LATELY_SHARE) {
                let set = (always..blocks).filter(|&b| self.flags[b] == 1);
                if let Some(oldest) = set.min_by_key(|&b| self.fed_at[b]) {
                    self.flags[oldest] = 0;
                    self.lately -= 1;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_tokens_are_always_there_and_others_while_they_are_fed() {
        let mut list = Shortlist::new(16 * 64);
        let listed = |list: &Shortlist| (0..64).filter(|&b| list.flags()[b] == 1).collect::<Vec<_>>();
        assert_eq!(listed(&list), [0, 1, 2, 3, 4, 5, 6, 7]);
        list.feed(&[3, 16 * 20, 16 * 20 + 15, 16 * 63 + 1]);
        assert_eq!(listed(&list)[8..], [20, 63]);
        list.feed(&(30..37).map(|b| 16 * b).collect::<Vec<_>>());
        assert_eq!(listed(&list)[8..], [30, 31, 32, 33, 34, 35, 36, 63], "20 was fed longest ago");
        list.feed(&[16 * 63, 16 * 40]);
        assert_eq!(listed(&list)[8..], [31, 32, 33, 34, 35, 36, 40, 63]);
    }

    #[test]
    fn vocabularies_of_any_size_have_a_list() {
        for vocab_size in [1, 15, 16, 17, 400] {
            let mut list = Shortlist::new(vocab_size);
            list.feed(&(0..vocab_size as u32).collect::<Vec<_>>());
            assert_eq!(list.flags().len(), vocab_size.div_ceil(16));
            assert_eq!(list.flags()[0], 1);
        }
    }
}
