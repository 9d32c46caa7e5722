//! Whether what was foreseen for a build deserves to be executed. A build that executes one thing after
//! another that nobody foresaw, and uses nothing of what was foreseen, is another than expected: what
//! is queued for it then stays there until it uses something after all.

/// So many executions that were not foreseen raise doubts, if nothing foreseen was used until then.
const UNFORESEEN: u32 = 8;

/// What a build has shown of the plan for it.
#[derive(Debug, Default)]
pub struct Trust {
    /// Something that was foreseen was used.
    is_earned: bool,
    unforeseen: u32,
}

impl Trust {
    /// The build executes something that was not foreseen.
    pub fn is_disappointed(&mut self) {
        self.unforeseen = self.unforeseen.saturating_add(1);
    }

    /// The build uses something that was foreseen.
    pub fn is_earned(&mut self) {
        self.is_earned = true;
    }

    /// There is a plan that knows better.
    pub fn is_renewed(&mut self) {
        self.unforeseen = 0;
    }

    /// Whether nothing more should be executed.
    pub fn is_lost(&self) -> bool {
        !self.is_earned && self.unforeseen >= UNFORESEEN
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disappointed(times: u32) -> Trust {
        Trust {
            unforeseen: times,
            ..Trust::default()
        }
    }

    #[test]
    fn trust_is_lost_by_misses_until_something_is_used() {
        let mut trust = disappointed(UNFORESEEN - 1);
        assert!(!trust.is_lost());
        trust.is_disappointed();
        assert!(trust.is_lost());
        trust.is_earned();
        assert!(!trust.is_lost());
        trust.is_disappointed();
        assert!(!trust.is_lost(), "once earned, it lasts");
    }

    #[test]
    fn another_plan_is_trusted_anew() {
        let mut trust = disappointed(UNFORESEEN);
        trust.is_renewed();
        assert!(!trust.is_lost());
    }
}
