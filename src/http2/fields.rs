//! A header list or trailers as they came: in order, and shared until somebody changes them. Only
//! few of them are ever looked at, so they are not hashed.

use std::sync::Arc;

use http::header::{HeaderMap, HeaderName, HeaderValue};

type Pair = (HeaderName, HeaderValue);

/// Header fields. To clone them costs next to nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fields(Arc<Vec<Pair>>);

impl Fields {
    /// None yet.
    pub fn new() -> Self {
        Fields::default()
    }

    /// The fields in their order.
    pub fn iter(&self) -> std::slice::Iter<'_, Pair> {
        self.0.iter()
    }

    /// The first value of `name`.
    pub fn get(&self, name: &HeaderName) -> Option<&HeaderValue> {
        let mut fields = self.0.iter();
        fields
            .find(|(other, _)| other == name)
            .map(|(_, value)| value)
    }

    /// Whether there is a field of this `name`.
    pub fn contains_key(&self, name: &HeaderName) -> bool {
        self.get(name).is_some()
    }

    /// Adds a field.
    pub fn append(&mut self, name: HeaderName, value: HeaderValue) {
        Arc::make_mut(&mut self.0).push((name, value));
    }

    /// Puts a field where the first of its name is, and takes the others away; adds it if there is
    /// none.
    pub fn insert(&mut self, name: HeaderName, value: HeaderValue) {
        let fields = Arc::make_mut(&mut self.0);
        let Some(first) = fields.iter().position(|(other, _)| *other == name) else {
            return fields.push((name, value));
        };
        let mut place = 0..;
        fields.retain(|(other, _)| place.next() == Some(first) || *other != name);
        fields[first].1 = value;
    }

    /// Takes the fields of this `name` away.
    pub fn remove(&mut self, name: &HeaderName) {
        if self.contains_key(name) {
            Arc::make_mut(&mut self.0).retain(|(other, _)| other != name);
        }
    }

    /// Adds all of `others`.
    pub fn extend(&mut self, others: Fields) {
        Arc::make_mut(&mut self.0).extend(others.iter().cloned());
    }

    /// Whether these are the same fields because one is a clone of the other.
    pub fn is_clone_of(&self, other: &Fields) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Whether clones of them exist.
    pub fn is_shared(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }

    /// As the map that libraries want.
    pub fn to_map(&self) -> HeaderMap {
        let mut map = HeaderMap::with_capacity(self.0.len());
        for (name, value) in self.iter() {
            map.append(name, value.clone());
        }
        map
    }
}

impl FromIterator<Pair> for Fields {
    fn from_iter<I: IntoIterator<Item = Pair>>(pairs: I) -> Self {
        Fields(Arc::new(pairs.into_iter().collect()))
    }
}

impl From<&HeaderMap> for Fields {
    fn from(map: &HeaderMap) -> Self {
        let pairs = map.iter();
        pairs
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::header::{ACCEPT, TE};

    fn value(text: &'static str) -> HeaderValue {
        HeaderValue::from_static(text)
    }

    #[test]
    fn fields_keep_their_order_and_a_clone_stays_as_it_was() {
        let mut fields =
            Fields::from_iter([(TE, value("1")), (ACCEPT, value("2")), (TE, value("3"))]);
        let before = fields.clone();
        assert!(fields.is_shared() && fields.is_clone_of(&before));
        assert_eq!(fields.get(&TE), Some(&value("1")));
        fields.insert(TE, value("4"));
        let values: Vec<_> = fields.iter().map(|(_, value)| value.clone()).collect();
        assert_eq!(values, ["4", "2"], "in the place of the first");
        assert_eq!(before.iter().count(), 3);
        assert!(!fields.is_clone_of(&before));
    }

    #[test]
    fn to_take_away_what_is_not_there_copies_nothing() {
        let mut fields = Fields::from_iter([(TE, value("1"))]);
        let before = fields.clone();
        fields.remove(&ACCEPT);
        assert!(fields.is_clone_of(&before));
        fields.remove(&TE);
        assert!(!fields.contains_key(&TE) && before.contains_key(&TE));
    }

    #[test]
    fn a_map_becomes_fields_and_a_map_again() {
        let mut map = HeaderMap::new();
        map.append(TE, value("1"));
        map.append(TE, value("2"));
        assert_eq!(Fields::from(&map).to_map(), map);
    }
}
