//! Digest-valued text: digests that stand as `hash/size` in the platform properties and the
//! environment of an action. (BuildStream hands the digest of a sandbox's root to recc in
//! `RECC_REMOTE_PLATFORM_chrootRootDigest`, and recc makes a platform property of it.) They change
//! with the inputs, so they are no part of an identity, and are replaced as digests in trees are.

use std::collections::HashMap;
use std::ops::Range;

use crate::cas::{Digest, DigestFunction};
use crate::reapi::{Action, Command, Platform};

/// The platform property that names a socket for nested execution.
const NESTED_SOCKET: &str = "remoteApisSocketPath";
/// What stands for digest-valued text in an identity.
const PLACEHOLDER: &str = "<digest>";

/// Old text and what takes its place.
pub type Replacements = HashMap<String, String>;

/// The digest-valued text of an action and its command, in the order in which it stands: digests
/// of `function`, which the action's own is of.
pub fn texts_of(action: &Action, command: &Command, function: DigestFunction) -> Vec<String> {
    let mut texts = Vec::new();
    let (mut action, mut command) = (action.clone(), command.clone());
    for value in values(&mut action, &mut command) {
        texts.extend(places(value, function).map(|place| value[place].to_owned()));
    }
    texts
}

/// Puts other text in the place of digests of `function` that `replacements` names. Says whether
/// there were any.
pub fn replace(
    action: &mut Action,
    command: &mut Command,
    function: DigestFunction,
    replacements: &Replacements,
) -> bool {
    let mut found = false;
    for value in values(action, command) {
        let new = with_places(value, function, |text| {
            replacements.get(text).map(String::as_str)
        });
        found |= new.is_some();
        if let Some(new) = new {
            *value = new;
        }
    }
    found
}

/// The identity of an action that runs actions itself: the digest of its `Action` without the
/// input root, and without digest-valued text, by the `function` of its own digest.
pub fn parent_key(action: &Action, command: &Command, function: DigestFunction) -> Digest {
    let (mut action, mut command) = (action.clone(), command.clone());
    for value in values(&mut action, &mut command) {
        if let Some(new) = with_places(value, function, |_| Some(PLACEHOLDER)) {
            *value = new;
        }
    }
    action.command_digest = Some(function.of_message(&command).0.to_proto());
    action.input_root_digest = None;
    function.of_message(&action).0
}

/// Whether the command is given a socket on which it may run actions itself.
pub fn runs_actions(action: &Action, command: &Command) -> bool {
    let platforms = [action.platform.as_ref(), platform_of(command)];
    let properties = platforms.into_iter().flatten().flat_map(|p| &p.properties);
    properties
        .filter(|property| property.name == NESTED_SOCKET)
        .any(|property| !property.value.is_empty())
}

#[allow(
    deprecated,
    reason = "clients of API 2.0 and 2.1 put it there, and casd reads it"
)]
fn platform_of(command: &Command) -> Option<&Platform> {
    command.platform.as_ref()
}

/// All text that may hold digests.
#[allow(
    deprecated,
    reason = "clients of API 2.0 and 2.1 put the platform into the command"
)]
fn values<'a>(
    action: &'a mut Action,
    command: &'a mut Command,
) -> impl Iterator<Item = &'a mut String> {
    let platforms = [action.platform.as_mut(), command.platform.as_mut()];
    let properties = platforms.into_iter().flatten();
    let properties = properties.flat_map(|platform| &mut platform.properties);
    let environment = command.environment_variables.iter_mut();
    properties
        .map(|property| &mut property.value)
        .chain(environment.map(|variable| &mut variable.value))
}

/// `text` with what `new` gives for each digest in it; `None` if nothing is replaced.
fn with_places<'a>(
    text: &str,
    function: DigestFunction,
    new: impl Fn(&str) -> Option<&'a str>,
) -> Option<String> {
    let mut replaced = String::new();
    let mut copied = 0;
    for place in places(text, function) {
        if let Some(new) = new(&text[place.clone()]) {
            replaced.push_str(&text[copied..place.start]);
            replaced.push_str(new);
            copied = place.end;
        }
    }
    (copied > 0).then(|| replaced + &text[copied..])
}

/// Where `hash/size` stands in `text`: as many lower-case hexadecimal digits as `function` makes, a
/// slash and a number, and no letter or digit beside them.
fn places(text: &str, function: DigestFunction) -> impl Iterator<Item = Range<usize>> {
    let bytes = text.as_bytes();
    let mut slashes = text.match_indices('/').map(|(at, _)| at);
    std::iter::from_fn(move || {
        slashes.find_map(|slash| {
            let start = slash.checked_sub(function.hash_digits())?;
            let is_hash = bytes[start..slash]
                .iter()
                .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
            let is_apart = start == 0 || !bytes[start - 1].is_ascii_alphanumeric();
            let digits = bytes[slash + 1..].iter();
            let digits = digits.take_while(|byte| byte.is_ascii_digit()).count();
            let end = slash + 1 + digits;
            let ends = bytes
                .get(end)
                .is_none_or(|byte| !byte.is_ascii_alphanumeric());
            (is_hash && is_apart && digits > 0 && ends).then_some(start..end)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reapi::command::EnvironmentVariable;
    use crate::reapi::platform::Property;

    const SHA256: DigestFunction = DigestFunction::Sha256;

    fn platform(value: &str) -> Option<Platform> {
        Some(Platform {
            properties: vec![Property {
                name: "chrootRootDigest".to_owned(),
                value: value.to_owned(),
            }],
        })
    }

    #[allow(deprecated, reason = "it is one of the places")]
    fn action(root: &str) -> (Action, Command) {
        let command = Command {
            arguments: vec![format!("echo {root}")],
            environment_variables: vec![EnvironmentVariable {
                name: "RECC_REMOTE_PLATFORM_chrootRootDigest".to_owned(),
                value: format!("{root} {root}"),
            }],
            platform: platform(root),
            ..Command::default()
        };
        let action = Action {
            command_digest: Some(Digest::of_message(&command).0.to_proto()),
            input_root_digest: Some(Digest::of(root.as_bytes()).to_proto()),
            platform: platform(root),
            ..Action::default()
        };
        (action, command)
    }

    #[test]
    fn digests_are_found_between_other_text() {
        let digest = Digest::of(b"x").to_string();
        let found = |text: &str| -> Vec<String> {
            let places = places(text, SHA256);
            places.map(|place| text[place].to_owned()).collect()
        };
        for text in [
            digest.clone(),
            format!("root={digest}"),
            format!("{digest},{digest}"),
            format!("/blobs/{digest}/"),
        ] {
            let count = text.matches(&digest).count();
            assert_eq!(found(&text), vec![digest.clone(); count], "{text}");
        }
        for text in [
            format!("0{digest}"),
            format!("{digest}x"),
            digest.to_uppercase(),
            digest.split('/').next().unwrap().to_owned(),
            format!("{}/", "0".repeat(64)),
            "ä/1".to_owned(),
            DigestFunction::Sha1.of(b"x").to_string(),
        ] {
            assert_eq!(found(&text), Vec::<String>::new(), "{text}");
        }
    }

    #[test]
    fn digests_in_platform_and_environment_are_replaced_and_nothing_else() {
        let (old, new) = (
            Digest::of(b"old").to_string(),
            Digest::of(b"new").to_string(),
        );
        let (mut changed, mut command) = action(&old);
        assert_eq!(texts_of(&changed, &command, SHA256).len(), 4);
        let replacements = Replacements::from([(old.clone(), new.clone())]);
        assert!(replace(&mut changed, &mut command, SHA256, &replacements));
        assert_eq!(texts_of(&changed, &command, SHA256), vec![new.clone(); 4]);
        assert_eq!(command.arguments, [format!("echo {old}")]);
        assert!(!replace(&mut changed, &mut command, SHA256, &replacements));
    }

    #[test]
    fn a_parent_is_the_same_whatever_digests_its_text_and_its_tree_have() {
        let key = |(action, command): &(Action, Command)| parent_key(action, command, SHA256);
        let (mut one, mut two) = (
            action(&Digest::of(b"1").to_string()),
            action(&Digest::of(b"22").to_string()),
        );
        one.1.arguments.clear();
        two.1.arguments.clear();
        assert_eq!(key(&one), key(&two));
        two.1.arguments.push("other".to_owned());
        assert_ne!(key(&one), key(&two));
    }

    #[test]
    fn an_action_runs_others_if_its_platform_names_a_socket() {
        let (mut action, command) = action("");
        assert!(!runs_actions(&action, &command));
        let property = &mut action.platform.as_mut().unwrap().properties[0];
        property.name = NESTED_SOCKET.to_owned();
        assert!(!runs_actions(&action, &command), "an empty name is none");
        let property = &mut action.platform.as_mut().unwrap().properties[0];
        property.value = "tmp/casd.sock".to_owned();
        assert!(runs_actions(&action, &command));
    }
}
