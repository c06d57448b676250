//! A mistake in a settings file as one line: parsers draw the place over several lines, which a log or a one-line error
//! tears apart.

use std::ops::Range;

/// `line 7: unknown field …`: what the parser says about these bytes of `text`; without a place, what it says alone.
#[must_use]
pub fn at_line(text: &str, place: Option<Range<usize>>, what: &str) -> String {
    let what = what.trim().replace('\n', ", ");
    match place.and_then(|place| text.get(..place.start)) {
        None => what,
        Some(before) => {
            let line = before.matches('\n').count() + 1;
            let shown = text.lines().nth(line - 1).unwrap_or_default().trim();
            format!("line {line}: {what} (the line is `{}`)", shown.chars().take(80).collect::<String>())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_is_counted_and_shown() {
        let text = "a = 1\nb = {\nc = 3\n";
        assert_eq!(at_line(text, Some(6..7), "no\nway\n"), "line 2: no, way (the line is `b = {`)");
        assert_eq!(at_line(text, Some(0..1), "no"), "line 1: no (the line is `a = 1`)");
        assert_eq!(at_line(text, None, "no"), "no");
        assert_eq!(at_line(text, Some(18..18), "no"), "line 4: no (the line is ``)");
        assert_eq!(at_line(text, Some(99..100), "no"), "no");
    }
}
