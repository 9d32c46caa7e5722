//! What a recorded action is called across its forms: by what stays the same when its inputs change.

use std::collections::HashMap;

use super::parent::BaseAction;
use crate::cas::Digest;

/// A recorded action, whatever it reads: its action key and its mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Prediction(pub [u8; 32]);

impl Prediction {
    /// The one of which `base` is a recorded form.
    pub fn of(base: &BaseAction) -> Option<Self> {
        let action_key = base.parts().ok()?.action_key;
        let mount = base.mount.as_ref().map(|mount| mount.display().to_string());
        let name = format!("{action_key}\0{}", mount.unwrap_or_default());
        Digest::of(name.as_bytes())
            .hash()
            .try_into()
            .ok()
            .map(Prediction)
    }
}

/// How many executions of each prediction in a row were wasted, where there are any.
pub type Wasted = HashMap<Prediction, u8>;
