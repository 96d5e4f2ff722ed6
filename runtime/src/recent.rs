//! A bounded number of things by key: the least recently used goes first.

/// Things by key, the most recently used last.
#[derive(Debug)]
pub(crate) struct Recent<K, T> {
    most: usize,
    entries: Vec<(K, T)>,
}

impl<K: PartialEq, T> Recent<K, T> {
    /// Room for `most` things.
    pub fn new(most: usize) -> Self {
        Self { most: most.max(1), entries: Vec::new() }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.entries.clear();
    }

    /// The thing of a key, made where there is none.
    /// # Errors
    /// Those of `make`; then nothing has changed.
    pub fn get_or_make<E>(&mut self, key: K, make: impl FnOnce() -> Result<T, E>) -> Result<&mut T, E> {
        let entry = match self.entries.iter().position(|(k, _)| *k == key) {
            Some(i) => self.entries.remove(i),
            None => (key, make()?),
        };
        if self.entries.len() == self.most {
            self.entries.remove(0);
        }
        self.entries.push(entry);
        Ok(&mut self.entries.last_mut().expect("one was pushed").1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_used_longest_is_forgotten() {
        let mut recent = Recent::new(2);
        let mut made = Vec::new();
        for key in [1, 2, 1, 3, 1, 2] {
            let thing = recent.get_or_make(key, || {
                made.push(key);
                Ok::<_, ()>(key * 10)
            });
            assert_eq!(thing, Ok(&mut (key * 10)));
        }
        assert_eq!(made, [1, 2, 3, 2]);
        assert_eq!(recent.get_or_make(9, || Err("no")), Err("no"));
        assert_eq!(recent.get_or_make(1, || Err("it is there")), Ok(&mut 10));
    }
}
