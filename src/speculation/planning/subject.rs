//! What a plan is made of: parents, the trees and commands of their actions, what is known now, and
//! what is worth it. It is loaded here, so that the plan itself calls nobody.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use tonic::Status;

use super::known::Known;
use super::worth::Worth;
use crate::cas::Digest;
use crate::cas::directories::{DirectoryCache, Trees};
use crate::cas::transfer::Cas;
use crate::speculation::records::parent::{Parent, ParentKind};

/// What a plan is made of.
#[derive(Clone, Debug, Default)]
pub struct Subject {
    /// The parents whose actions are adapted.
    pub parents: Vec<PlannedParent>,
    /// The directories of all trees that they name.
    pub trees: Trees,
    /// The commands of actions with digest-valued text.
    pub commands: HashMap<Digest, Bytes>,
    /// What they are adapted to.
    pub known: Known,
    /// Which of them are executed.
    pub worth: Worth,
}

impl Subject {
    /// What a plan for `parents` needs to know.
    ///
    /// # Errors
    /// The backend's status, when it cannot be asked.
    pub async fn load(
        cas: &Cas,
        directories: &DirectoryCache,
        parents: Vec<PlannedParent>,
        known: Known,
    ) -> Result<Self, Status> {
        let mut roots: HashMap<Arc<str>, Vec<Digest>> = HashMap::new();
        let mut commands: HashMap<Arc<str>, Vec<Digest>> = HashMap::new();
        for PlannedParent { parent, .. } in &parents {
            let identity = &parent.identity;
            let bases = parent.actions.values();
            let of_bases = roots.entry(identity.instance.clone()).or_default();
            of_bases.extend(bases.clone().map(|base| base.input_root));
            let with_texts = bases.filter(|base| !base.texts.is_empty());
            let with_texts = with_texts.filter_map(|base| base.parts().ok());
            let of_bases = commands.entry(identity.instance.clone()).or_default();
            of_bases.extend(with_texts.map(|parts| parts.command));
            if let ParentKind::Action(action) = &identity.kind {
                let of_parents = roots.entry(action.instance.clone()).or_default();
                match known.parents.get(&identity.weak_key()) {
                    Some(current) => of_parents.push(current.input_root),
                    None => of_parents.extend(&parent.text_roots),
                }
            }
        }
        let mut subject = Subject {
            parents,
            known,
            ..Subject::default()
        };
        for (instance, roots) in roots {
            subject
                .trees
                .extend(directories.load(cas, &instance, roots).await?);
        }
        for (instance, digests) in commands {
            subject
                .commands
                .extend(cas.fetch(&instance, digests).await?);
        }
        Ok(subject)
    }
}

/// A parent in a plan.
#[derive(Clone, Debug)]
pub struct PlannedParent {
    /// Its records.
    pub parent: Arc<Parent>,
    /// Which of its actions are adapted.
    pub share: Share,
}

/// How much of a parent's actions is adapted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Share {
    /// All of them.
    Whole,
    /// Those that actions of other parents wait for.
    OnDemand,
}
