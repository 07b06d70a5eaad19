//! The pages of `docs` that are made from the code's tables: a test checks each, and writes it anew when
//! `ANYKVM_WRITE_DOCS` is set (`cargo xtask docs`).

use std::path::Path;

/// What stands between `<!-- NAME -->` and `<!-- end -->`.
pub(crate) type Part = (&'static str, fn() -> String);

/// A list in lines of readable length.
pub(crate) fn paragraph(words: impl Iterator<Item = String>) -> String {
    let mut text = String::new();
    let mut column = 0;
    for word in words {
        if column + word.len() > 100 {
            text.push('\n');
            column = 0;
        } else if column > 0 {
            text.push(' ');
            column += 1;
        }
        column += word.len();
        text += &word;
    }
    text.push('\n');
    text
}

/// The page with its parts made anew.
fn renewed(page: &str, parts: &[Part]) -> String {
    parts.iter().fold(page.to_owned(), |page, (name, make)| {
        let begin = format!("<!-- {name} -->\n");
        let (before, rest) = page.split_once(&begin).expect(name);
        let (_, after) = rest.split_once("<!-- end -->").expect(name);
        format!("{before}{begin}{}<!-- end -->{after}", make())
    })
}

/// Fails when a page is not what the tables say, or makes it so.
pub(crate) fn check(name: &str, parts: &[Part]) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs");
    let path = folder.join(name);
    let page = std::fs::read_to_string(&path).unwrap();
    let new = renewed(&page, parts);
    if std::env::var_os("ANYKVM_WRITE_DOCS").is_some() {
        std::fs::write(&path, new).unwrap();
        return;
    }
    assert!(page == new, "docs/{name} is old: run cargo xtask docs");
}
