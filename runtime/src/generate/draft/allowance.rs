//! What drafts may cost where they do not pay.

/// Tokens that drafts may cost before they have given any.
const FIRST_ALLOWED: f64 = 2.5;
/// Share of all tokens that drafts may cost.
const ALLOWED_SHARE: f64 = 0.0075;
/// What drafts gave before that they may cost later.
const MOST_SAVED: f64 = 8.0;
/// What a trial may cost beside what the last one did until the allowance was used up.
const ANOTHER_STEP: f64 = 0.5;

/// What drafts may cost, in tokens that steps without drafts would give in the same time.
#[derive(Clone, Debug)]
pub(super) struct Allowance {
    left: f64,
    /// It is not used up, or has become enough for another trial.
    open: bool,
    /// What was left when drafts were begun.
    begun_with: f64,
    /// Enough for a trial.
    enough: f64,
}

impl Allowance {
    pub const FULL: Self = Self { left: FIRST_ALLOWED, open: true, begun_with: FIRST_ALLOWED, enough: FIRST_ALLOWED };

    /// Nothing may be drafted while it is not.
    pub const fn is_open(&self) -> bool {
        self.open
    }

    /// A trial may be paid from it.
    pub fn is_enough(&self) -> bool {
        self.left >= self.enough
    }

    /// Drafts begin.
    pub fn begin(&mut self) {
        self.begun_with = self.left;
    }

    /// A step gave `tokens` tokens a sequence, in the time of `steps` steps without drafts.
    pub fn note(&mut self, tokens: f64, steps: f64) {
        let growth = (ALLOWED_SHARE * tokens).min((self.enough - self.left).max(0.0));
        self.left = (self.left + growth + tokens - steps).min(MOST_SAVED.max(self.enough));
        if self.open && self.left < 0.0 {
            self.open = false;
            // the first step may have used it up, of which feeding the draft what it missed is a part
            self.enough = (self.begun_with - self.left + ANOTHER_STEP).max(FIRST_ALLOWED);
        } else if self.left >= self.enough {
            self.open = true;
        }
    }
}
