//! Plots: a line over sizes for each contender, or a bar.

use anyhow::{Result, anyhow};
use plotters::coord::ranged1d::{IntoSegmentedCoord as _, SegmentValue};
use plotters::prelude::*;
use proxy_tests::results::{Case, Row, Spread, contender};

use super::{direction, figure, size};

const SIZE: (u32, u32) = (760, 400);
/// Colours that people with any eyesight tell apart (Okabe and Ito).
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 0, 0),
    RGBColor(0, 114, 178),
    RGBColor(0, 158, 115),
    RGBColor(86, 180, 233),
    RGBColor(213, 94, 0),
    RGBColor(230, 159, 0),
    RGBColor(204, 121, 167),
];

/// A contender has the same colour in all plots.
fn colour(contender: &str, index: usize) -> RGBColor {
    let place = contender::ALL.iter().position(|name| *name == contender);
    COLOURS[place.unwrap_or(index) % COLOURS.len()]
}

/// The plot of a case.
pub(super) fn svg(case: &Case) -> Result<String> {
    let mut text = String::new();
    let sizes = case.rows.iter().filter(|row| row.at.is_some()).count();
    let drawn = if sizes > 0 {
        lines(case, &mut text)
    } else {
        bars(case, &mut text)
    };
    // Its error borrows the text.
    drawn.map_err(|error| anyhow!("drawing {}: {error}", case.name))?;
    Ok(text)
}

type Drawn = std::result::Result<(), String>;

fn text_of(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn contenders(case: &Case) -> Vec<&str> {
    let mut names: Vec<&str> = Vec::new();
    for row in &case.rows {
        if !names.contains(&row.contender.as_str()) {
            names.push(&row.contender);
        }
    }
    names
}

/// From zero to a little more than everything.
fn top(case: &Case) -> f64 {
    let spreads = case.rows.iter().filter_map(Row::spread);
    let most = spreads.map(|spread| spread.max).fold(0.0, f64::max);
    if most > 0.0 { most * 1.08 } else { 1.0 }
}

fn bottom(case: &Case) -> f64 {
    let spreads = case.rows.iter().filter_map(Row::spread);
    spreads.map(|spread| spread.min).fold(0.0, f64::min) * 1.08
}

fn lines(case: &Case, text: &mut String) -> Drawn {
    let mut sizes: Vec<u64> = case.rows.iter().filter_map(|row| row.at).collect();
    sizes.sort_unstable();
    sizes.dedup();
    let place = |row: &Row| {
        sizes
            .iter()
            .position(|size| Some(*size) == row.at)
            .map(|place| place as f64)
    };
    let root = SVGBackend::with_string(text, SIZE).into_drawing_area();
    root.fill(&WHITE).map_err(text_of)?;
    let last = sizes.len() as f64 - 1.0;
    let mut chart = ChartBuilder::on(&root)
        .caption(caption(case), ("sans-serif", 15))
        .margin(10)
        .x_label_area_size(40)
        .y_label_area_size(75)
        .build_cartesian_2d(-0.3..last + 0.3, bottom(case)..top(case))
        .map_err(text_of)?;
    let label = |x: &f64| {
        let near = x.round();
        let is_size = (x - near).abs() < 1e-6 && near >= 0.0;
        sizes
            .get(near as usize)
            .filter(|_| is_size)
            .map(|at| size(Some(*at)))
            .unwrap_or_default()
    };
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .x_labels(2 * sizes.len() + 1)
        .x_label_formatter(&label)
        .x_desc(case.axis.clone().unwrap_or_default())
        .y_desc(case.unit.clone())
        .y_label_formatter(&|y| figure(*y))
        .draw()
        .map_err(text_of)?;
    for (index, name) in contenders(case).into_iter().enumerate() {
        let colour = colour(name, index);
        let rows = case.rows.iter().filter(|row| row.contender == name);
        let points: Vec<(f64, Spread)> = rows.filter_map(|row| Some((place(row)?, row.spread()?))).collect();
        let line = points.iter().map(|(x, spread)| (*x, spread.median));
        chart
            .draw_series(LineSeries::new(line, colour.stroke_width(2)).point_size(3))
            .map_err(text_of)?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(2)));
        let ends = points.iter().map(|(x, spread)| {
            // Side by side, so that each is seen.
            let x = x + 0.012 * index as f64;
            PathElement::new([(x, spread.min), (x, spread.max)], colour.stroke_width(1))
        });
        chart.draw_series(ends).map_err(text_of)?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerLeft)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .draw()
        .map_err(text_of)?;
    root.present().map_err(text_of)
}

fn bars(case: &Case, text: &mut String) -> Drawn {
    let names = contenders(case);
    let (each, gap) = if names.len() > 10 { (22, 3) } else { (34, 6) };
    let longest = names.iter().map(|name| name.chars().count()).max().unwrap_or_default();
    let height = 90 + each * names.len() as u32;
    let root = SVGBackend::with_string(text, (SIZE.0, height)).into_drawing_area();
    root.fill(&WHITE).map_err(text_of)?;
    // The first one on top.
    let count = names.len() as i32;
    let mut chart = ChartBuilder::on(&root)
        .caption(caption(case), ("sans-serif", 15))
        .margin(10)
        .margin_right(30)
        .x_label_area_size(40)
        .y_label_area_size(30 + 6 * longest as u32)
        .build_cartesian_2d(bottom(case)..top(case), (0..count - 1).into_segmented())
        .map_err(text_of)?;
    let label = |y: &SegmentValue<i32>| match y {
        SegmentValue::CenterOf(place) | SegmentValue::Exact(place) => names
            .get((count - 1 - place) as usize)
            .copied()
            .unwrap_or_default()
            .to_owned(),
        SegmentValue::Last => String::new(),
    };
    chart
        .configure_mesh()
        .disable_y_mesh()
        .light_line_style(TRANSPARENT)
        .y_labels(names.len())
        .y_label_formatter(&label)
        .x_desc(case.unit.clone())
        .x_label_formatter(&|x| figure(*x))
        .draw()
        .map_err(text_of)?;
    for (index, row) in case.rows.iter().enumerate() {
        let Some(spread) = row.spread() else { continue };
        let place = count - 1 - index as i32;
        let colour = colour(&row.contender, index);
        let mut bar = Rectangle::new(
            [
                (0.0, SegmentValue::Exact(place)),
                (spread.median, SegmentValue::Exact(place + 1)),
            ],
            colour.mix(0.7).filled(),
        );
        bar.set_margin(gap, gap, 0, 0);
        chart.draw_series([bar]).map_err(text_of)?;
        let middle = SegmentValue::CenterOf(place);
        let ends = PathElement::new(
            [(spread.min, middle.clone()), (spread.max, middle)],
            BLACK.stroke_width(1),
        );
        chart.draw_series([ends]).map_err(text_of)?;
    }
    root.present().map_err(text_of)
}

fn caption(case: &Case) -> String {
    format!("{} ({})", case.title, direction(case.better))
}
