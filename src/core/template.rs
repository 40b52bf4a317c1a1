//! Texts of statements with names to be put in. In one pass: what is put in is never looked at again, so that no name, whatever
//! its owner has called it, becomes part of a statement's text.

/// The text with each of these words replaced by what stands beside it.
pub fn fill(template: &str, names: &[(&str, &str)]) -> String {
    let mut filled = String::with_capacity(template.len() + 64);
    let mut rest = template;
    while let Some(next) = rest.chars().next() {
        match names.iter().find(|(word, _)| rest.starts_with(word)) {
            Some((word, name)) => {
                filled.push_str(name);
                rest = rest.get(word.len()..).unwrap_or_default();
            }
            None => {
                filled.push(next);
                rest = rest.get(next.len_utf8()..).unwrap_or_default();
            }
        }
    }
    filled
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_put_in_and_not_looked_at_again() {
        let names = [("TABLE", "\"my PROGRESS TABLE\".t"), ("PROGRESS", "p")];
        assert_eq!(fill("SELECT é FROM TABLE, PROGRESS", &names), "SELECT é FROM \"my PROGRESS TABLE\".t, p");
        assert_eq!(fill("", &names), "");
    }
}
