//! Instance names: what the upstream calls the instances that clients ask for.
//!
//! An `InstanceRewriter` changes the requests, those of primed's own among them. Answers hold no instance names, and operation names are the upstream's own.

use std::collections::HashMap;

use crate::config::upstream::{InstanceRule, Instances};

/// The upstream's name of each instance.
#[derive(Debug, Default)]
pub struct InstanceMap {
    named: HashMap<String, String>,
    all: Option<String>,
}

impl InstanceMap {
    /// A map that follows `rules`, which are about different instances.
    pub fn new(rules: &[InstanceRule]) -> Self {
        let mut map = InstanceMap::default();
        for rule in rules {
            match &rule.from {
                Instances::All => map.all = Some(rule.to.clone()),
                Instances::Named(name) => {
                    map.named.insert(name.clone(), rule.to.clone());
                }
            }
        }
        map
    }

    /// Whether every name stays as it is.
    pub fn is_identity(&self) -> bool {
        self.named.is_empty() && self.all.is_none()
    }

    /// What the upstream calls the instance that clients call `name`.
    pub fn upstream_name<'a>(&'a self, name: &'a str) -> &'a str {
        let rule = self.named.get(name).or(self.all.as_ref());
        rule.map_or(name, String::as_str)
    }

    /// What the upstream calls the blob that clients call `name` in `ByteStream`, if that is
    /// something else. A name that does not follow REAPI's rules stays as it is.
    pub fn upstream_resource(&self, name: &str) -> Option<String> {
        let (instance, blob) = split_resource(name)?;
        let renamed = self.upstream_name(instance);
        match renamed {
            _ if renamed == instance => None,
            "" => Some(blob.to_owned()),
            _ => Some(format!("{renamed}/{blob}")),
        }
    }
}

/// Splits a resource name into the instance, which may have several segments or none, and what
/// follows it. (REAPI, `ContentAddressableStorage`: the first of these words ends the instance.)
fn split_resource(name: &str) -> Option<(&str, &str)> {
    let mut start = 0;
    for segment in name.split('/') {
        if matches!(segment, "blobs" | "compressed-blobs" | "uploads") {
            let instance = name[..start].trim_end_matches('/');
            return Some((instance, &name[start..]));
        }
        start += segment.len() + 1;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(rules: &[&str]) -> InstanceMap {
        let rules: Vec<InstanceRule> = rules.iter().map(|text| text.parse().unwrap()).collect();
        InstanceMap::new(&rules)
    }

    #[test]
    fn a_rule_of_its_own_goes_before_the_one_for_all() {
        let map = map(&["a=b", "=main", "keep=keep", "*=rest"]);
        assert!(!map.is_identity());
        for (name, upstream) in [
            ("a", "b"),
            ("", "main"),
            ("keep", "keep"),
            ("b", "rest"),
            ("a/b", "rest"),
        ] {
            assert_eq!(map.upstream_name(name), upstream, "{name}");
        }
        let none = InstanceMap::default();
        assert!(none.is_identity());
        assert_eq!(none.upstream_name("a"), "a");
    }

    #[test]
    fn resource_names_change_in_their_instance_only() {
        let map = map(&["=main", "a/b=x/y", "gone="]);
        for (name, upstream) in [
            ("blobs/HASH/1", Some("main/blobs/HASH/1")),
            ("/blobs/HASH/1", Some("main/blobs/HASH/1")),
            ("a/b/blobs/HASH/1", Some("x/y/blobs/HASH/1")),
            (
                "a/b/uploads/ID/blobs/HASH/1",
                Some("x/y/uploads/ID/blobs/HASH/1"),
            ),
            (
                "uploads/ID/compressed-blobs/zstd/HASH/1/name",
                Some("main/uploads/ID/compressed-blobs/zstd/HASH/1/name"),
            ),
            (
                "gone/compressed-blobs/zstd/HASH/1",
                Some("compressed-blobs/zstd/HASH/1"),
            ),
            (
                "gone/uploads/ID/blobs/HASH/1",
                Some("uploads/ID/blobs/HASH/1"),
            ),
            ("a/blobs/HASH/1", None),
            ("blobless/HASH/1", None),
            ("", None),
        ] {
            assert_eq!(map.upstream_resource(name).as_deref(), upstream, "{name}");
        }
    }
}
