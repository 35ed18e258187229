//! Values of many types, there and back in the binary format.

use crate::clients::{Moving, one};
use chrono::{DateTime, NaiveDate, NaiveDateTime, NaiveTime, Utc};
use drivers::test;
use postgres_types::{FromSql, FromSqlOwned, ToSql, Type};
use serde_json::{Value, json};
use std::fmt::Debug;
use std::net::IpAddr;
use uuid::Uuid;

pub fn add() {
    test("values", values);
    test("values of typed queries", typed_values);
    test("custom types", custom_types);
    test("simple queries", simple_queries);
    test("large values", large_values);
}

const HARD_TEXT: &str = "ögel 🐘 'single' \"double\" \\back $1 \n";
const LARGE_BYTES: usize = 10_000_000;

fn all_bytes() -> Vec<u8> {
    (0..=255).collect()
}

fn moment() -> NaiveDateTime {
    let day = NaiveDate::from_ymd_opt(2026, 1, 2).unwrap();
    day.and_hms_micro_opt(3, 4, 5, 6).unwrap()
}

async fn exchange<T>(moving: &mut Moving, kind: &str, value: T, told: &mut Vec<Option<String>>)
where
    T: ToSql + FromSqlOwned + PartialEq + Debug + Sync,
{
    let query = format!("SELECT $1::{kind}, $1::{kind}::text");
    let row = moving.client().await.query_one(&query, &[&value]).await;
    let row = row.unwrap();
    assert_eq!(row.get::<_, T>(0), value, "{kind}");
    told.push(row.get(1));
}

async fn values() -> String {
    let mut moving = Moving::connect().await;
    let mut told = Vec::new();
    let utc: DateTime<Utc> = moment().and_utc();
    macro_rules! exchange {
        ($($kind:literal: $value:expr),* $(,)?) => {
            $(exchange(&mut moving, $kind, $value, &mut told).await;)*
        };
    }
    exchange! {
        "int2": i16::MIN,
        "int4": i32::MAX,
        "int8": i64::MIN,
        "float4": 1.5e-30_f32,
        "float8": 1.0_f64 / 3.0,
        "float8": f64::INFINITY,
        "float8": f64::NEG_INFINITY,
        "bool": true,
        "text": HARD_TEXT.to_string(),
        "text": String::new(),
        "bytea": all_bytes(),
        "bytea": Vec::<u8>::new(),
        "date": NaiveDate::from_ymd_opt(2026, 2, 28).unwrap(),
        "time": NaiveTime::from_hms_micro_opt(23, 59, 59, 999_999).unwrap(),
        "timestamp": moment(),
        "timestamptz": utc,
        "uuid": Uuid::from_u128(u128::MAX - 5),
        "jsonb": json!({"a": [1, 2.5, null, "ü"], "b": {"c": true}}),
        "json": json!({"quote": "'\"\\"}),
        "inet": "2001:db8::1".parse::<IpAddr>().unwrap(),
        "int4[]": vec![Some(1), None, Some(3)],
        "text[]": vec!["a", "b\"c", "{}", "NULL", "ü,", ""].into_iter().map(String::from).collect::<Vec<_>>(),
        "float8[]": [1.0, f64::INFINITY],
        "text": None::<String>,
        "int8": None::<i64>,
    }
    let client = moving.client().await;
    assert!(
        one::<f64>(client, "SELECT $1::float8", &[&f64::NAN])
            .await
            .is_nan()
    );
    // The driver knows no numbers of any length, intervals and ranges; they go as text.
    for (kind, text) in [
        ("interval", "1 year 2 mons 3 days 00:00:04.000005"),
        ("int4range", "[1,9)"),
        ("numeric", "123456789.000000001"),
        ("numeric", "NaN"),
    ] {
        let query = format!("SELECT $1::text::{kind}::text");
        assert_eq!(
            one::<String>(moving.client().await, &query, &[&text]).await,
            text
        );
    }
    format!("{told:?}")
}

/// A typed query takes one round trip, with an unnamed statement.
async fn typed_values() -> String {
    let mut moving = Moving::connect().await;
    let mut told = Vec::new();
    for number in 0..20 {
        let text = format!("{HARD_TEXT}{number}");
        let row = moving
            .client()
            .await
            .query_typed_one(
                "SELECT $1 + 1, $2 || '!', $3, $4",
                &[
                    (&number, Type::INT4),
                    (&text, Type::TEXT),
                    (&json!([number]), Type::JSONB),
                    (&None::<i64>, Type::INT8),
                ],
            )
            .await
            .unwrap();
        told.push((
            row.get::<_, i32>(0),
            row.get::<_, String>(1),
            row.get::<_, Value>(2),
            row.get::<_, Option<i64>>(3),
        ));
    }
    format!("{told:?}")
}

#[derive(Clone, Debug, PartialEq, ToSql, FromSql)]
#[postgres(name = "mood", rename_all = "lowercase")]
enum Mood {
    Sad,
    Happy,
}

#[derive(Clone, Debug, PartialEq, ToSql, FromSql)]
#[postgres(name = "pair")]
struct Pair {
    number: Option<i32>,
    word: Option<String>,
}

#[derive(Clone, Debug, PartialEq, ToSql, FromSql)]
#[postgres(name = "even")]
struct Even(i32);

/// The driver asks for what it does not know with statements of its own.
async fn custom_types() -> String {
    let mut moving = Moving::connect().await;
    let mut told = Vec::new();
    let pair = Pair {
        number: None,
        word: Some("a (\"quoted\", word)".to_string()),
    };
    exchange(&mut moving, "matrix.mood", Mood::Happy, &mut told).await;
    let moods = vec![Mood::Sad, Mood::Happy];
    exchange(&mut moving, "matrix.mood[]", moods, &mut told).await;
    exchange(&mut moving, "matrix.pair", pair.clone(), &mut told).await;
    exchange(&mut moving, "matrix.pair[]", vec![pair], &mut told).await;
    exchange(&mut moving, "matrix.even", Even(4), &mut told).await;
    format!("{told:?}")
}

/// Simple queries answer in the text format.
async fn simple_queries() -> String {
    let mut moving = Moving::connect().await;
    let mut told = Vec::new();
    for query in [
        "SELECT 'NaN'::float8, 1.50::numeric, true, '\\x00ff'::bytea, NULL, ARRAY[1, NULL]",
        "SELECT 1; SELECT n FROM generate_series(1, 3) n; SET LOCAL work_mem = '5MB'",
        "SELECT 1; SELECT 1/0; SELECT 3",
        "BEGIN; SELECT 4; COMMIT; SELECT 5",
        "",
        "/* nothing */ ; ;",
        "SELECT wrong syntax here",
        "SELECT interval '1 year 3 days', int4range(1, 9), '(1,2)'::point",
    ] {
        match moving.client().await.simple_query(query).await {
            Ok(answers) => told.push(format!("{answers:?}")),
            Err(error) => told.push(error.code().unwrap().code().to_string()),
        }
    }
    format!("{told:?}")
}

async fn large_values() -> String {
    let mut moving = Moving::connect().await;
    let text = "0123456789".repeat(LARGE_BYTES / 10);
    let client = moving.client().await;
    assert!(one::<String>(client, "SELECT $1::text", &[&text]).await == text);
    let raw = all_bytes().repeat(LARGE_BYTES / 256);
    let client = moving.client().await;
    assert!(one::<Vec<u8>>(client, "SELECT $1::bytea", &[&raw]).await == raw);
    let literal = format!("SELECT length('{text}')");
    let answers = moving.client().await.simple_query(&literal).await.unwrap();
    let sum: i32 = one(moving.client().await, "SELECT $1 + 1", &[&1]).await;
    format!("{} {sum}", answers.len())
}
