//! The chart of `docs/benchmarks.md`: one group of bars a kind of work, on a logarithmic scale.

use std::fmt::Write;

use super::ENGINES;
use super::work::Work;

const WIDTH: f64 = 760.0;
/// Where bars begin: names are left of it.
const LEFT: f64 = 130.0;
const RIGHT: f64 = 60.0;
const TOP: f64 = 56.0;
const BAR: f64 = 9.0;
const GROUP: f64 = 3.0 * BAR + 12.0;
const COLOURS: [&str; 3] = ["#b0b0b0", "#e0a050", "#3070b0"];
/// The scale: times the host.
const TICKS: [f64; 8] = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0];

/// Draws it.
pub fn draw(work: &Work) -> String {
    let mut groups: Vec<(&str, [f64; 3])> =
        work.0.iter().map(|k| (k.name.as_str(), k.ratios)).collect();
    groups.push(("geometric mean", work.means()));
    let all = groups.iter().flat_map(|g| g.1);
    let most = all.fold(2.0_f64, f64::max);
    let end = TICKS.into_iter().find(|t| *t >= most).unwrap_or(most);
    let height = TOP + groups.len() as f64 * GROUP + 10.0;
    // Bars begin at 0.8, so that as fast as the host is still a bar.
    let x = |ratio: f64| {
        let part = (ratio.max(0.8) / 0.8).ln() / (end / 0.8).ln();
        LEFT + part.min(1.0) * (WIDTH - LEFT - RIGHT)
    };

    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height:.0}\" \
         font-family=\"sans-serif\" font-size=\"11\">\n\
         <title>Time as a multiple of the host's; shorter is faster</title>\n\
         <rect width=\"{WIDTH}\" height=\"{height:.0}\" fill=\"#ffffff\"/>\n"
    );
    let text = |svg: &mut String, x: f64, y: f64, anchor: &str, text: &str| {
        let _ = writeln!(
            svg,
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{text}</text>"
        );
    };
    let rectangle = |svg: &mut String, x: f64, y: f64, width: f64, colour: &str| {
        let _ = writeln!(
            svg,
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{BAR}\" fill=\"{colour}\"/>"
        );
    };
    for (i, engine) in ENGINES.into_iter().enumerate() {
        let at = LEFT + i as f64 * 110.0;
        rectangle(&mut svg, at, 8.0, BAR, COLOURS[i]);
        text(&mut svg, at + 14.0, 16.5, "start", engine.name());
    }
    let note = "times the host's time, shorter is faster";
    text(&mut svg, WIDTH - 10.0, 16.5, "end", note);
    for tick in TICKS.into_iter().filter(|t| *t <= end) {
        let at = x(tick);
        let _ = writeln!(
            svg,
            "<line x1=\"{at:.1}\" y1=\"{:.1}\" x2=\"{at:.1}\" y2=\"{height:.1}\" stroke=\"#dddddd\"/>",
            TOP - 8.0
        );
        text(&mut svg, at, TOP - 12.0, "middle", &format!("{tick}"));
    }
    for (g, (name, ratios)) in groups.iter().enumerate() {
        let y = TOP + g as f64 * GROUP;
        text(&mut svg, LEFT - 8.0, y + 1.5 * BAR + 4.0, "end", name);
        for (i, ratio) in ratios.iter().enumerate() {
            let y = y + i as f64 * BAR;
            rectangle(&mut svg, x(0.8), y, x(*ratio) - x(0.8), COLOURS[i]);
            text(
                &mut svg,
                x(*ratio) + 4.0,
                y + BAR - 0.5,
                "start",
                &format!("{ratio:.2}"),
            );
        }
    }
    svg.push_str("</svg>\n");
    svg
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::work::Kind;

    #[test]
    fn every_kind_has_a_bar_for_each_engine() {
        let kind = |name: &str, ratios| Kind {
            name: name.to_owned(),
            native: 1.0,
            ratios,
        };
        let work = Work(vec![
            kind("a", [1.0, 150.0, 0.5]),
            kind("b", [3.0, 20.0, 2.0]),
        ]);
        let svg = draw(&work);
        // The ground, three in the legend, and three for each kind and the mean.
        assert_eq!(svg.matches("<rect").count(), 1 + 3 + 3 * 3);
        assert!(
            svg.contains(">200</text>"),
            "the scale reaches the longest bar"
        );
        assert!(!svg.contains("NaN"));
    }
}
