//! Values of many types, there and back in the binary format.

use crate::connections::Moving;
use drivers::test;
use sqlx::postgres::Postgres;
use sqlx::postgres::types::{PgInterval, PgRange};
use sqlx::types::chrono::{DateTime, NaiveDate, NaiveDateTime, NaiveTime, Utc};
use sqlx::types::{BigDecimal, Json, JsonValue, Uuid};
use sqlx::{AssertSqlSafe, Decode, Encode, Row, Type};
use std::fmt::Debug;

pub fn add() {
    test("values", || values(true));
    test("values of statements not kept", || values(false));
    test("values as text", values_as_text);
    test("custom types", custom_types);
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

async fn exchange<T>(moving: &mut Moving, kind: &str, value: T, is_kept: bool) -> Option<String>
where
    T: for<'q> Encode<'q, Postgres> + for<'r> Decode<'r, Postgres> + Type<Postgres>,
    T: Clone + PartialEq + Debug + Send + 'static,
{
    let query = AssertSqlSafe(format!("SELECT $1::{kind}, $1::{kind}::text"));
    let query = sqlx::query(query).bind(value.clone()).persistent(is_kept);
    let row = query.fetch_one(moving.connection().await).await.unwrap();
    assert_eq!(row.get::<T, _>(0), value, "{kind}");
    row.get(1)
}

async fn values(is_kept: bool) -> String {
    let mut moving = Moving::connect().await;
    let mut told = Vec::new();
    let utc: DateTime<Utc> = moment().and_utc();
    let interval = PgInterval {
        months: 14,
        days: 3,
        microseconds: 4_000_005,
    };
    macro_rules! exchange {
        ($($kind:literal: $value:expr),* $(,)?) => {
            $(told.push(exchange(&mut moving, $kind, $value, is_kept).await);)*
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
        "numeric": "123456789.000000001".parse::<BigDecimal>().unwrap(),
        "bool": true,
        "text": HARD_TEXT.to_string(),
        "text": String::new(),
        "bytea": all_bytes(),
        "bytea": Vec::<u8>::new(),
        "date": NaiveDate::from_ymd_opt(2026, 2, 28).unwrap(),
        "time": NaiveTime::from_hms_micro_opt(23, 59, 59, 999_999).unwrap(),
        "timestamp": moment(),
        "timestamptz": utc,
        "interval": interval,
        "uuid": Uuid::from_u128(u128::MAX - 5),
        "jsonb": serde_json::json!({"a": [1, 2.5, null, "ü"], "b": {"c": true}}),
        "json": Json(vec!["'\"\\".to_string()]),
        "int4range": PgRange::from(1..9),
        "int4[]": vec![Some(1), None, Some(3)],
        "text[]": vec!["a", "b\"c", "{}", "NULL", "ü,", ""].into_iter().map(String::from).collect::<Vec<_>>(),
        "float8[]": vec![1.0, f64::INFINITY],
        "text": None::<String>,
        "int8": None::<i64>,
    }
    let query = sqlx::query_scalar("SELECT $1::float8").bind(f64::NAN);
    let back: f64 = query.fetch_one(moving.connection().await).await.unwrap();
    assert!(back.is_nan());
    format!("{told:?}")
}

/// Simple queries answer in the text format.
async fn values_as_text() -> String {
    let mut moving = Moving::connect().await;
    let query = "SELECT 'NaN'::float8, 1.5::numeric, true, '\\x00ff'::bytea, '{1,2}'::int[],
                        '{\"a\": [1]}'::jsonb, '2026-01-02 03:04:05+00'::timestamptz, NULL::text";
    let row = sqlx::raw_sql(query)
        .fetch_one(moving.connection().await)
        .await
        .unwrap();
    assert!(row.get::<f64, _>(0).is_nan());
    let told = (
        row.get::<BigDecimal, _>(1),
        row.get::<bool, _>(2),
        row.get::<Vec<u8>, _>(3),
        row.get::<Vec<i32>, _>(4),
        row.get::<JsonValue, _>(5),
        row.get::<DateTime<Utc>, _>(6),
        row.get::<Option<String>, _>(7),
    );
    format!("{told:?}")
}

#[derive(Clone, Debug, PartialEq, sqlx::Type)]
#[sqlx(type_name = "matrix.mood", rename_all = "lowercase")]
enum Mood {
    Sad,
    Happy,
}

#[derive(Clone, Debug, PartialEq, sqlx::Type)]
#[sqlx(type_name = "matrix.pair")]
struct Pair {
    number: Option<i32>,
    word: Option<String>,
}

/// The driver asks for what it does not know with statements of its own.
async fn custom_types() -> String {
    let mut moving = Moving::connect().await;
    let pair = Pair {
        number: None,
        word: Some("a (\"quoted\", word)".to_string()),
    };
    let moods = vec![Mood::Sad, Mood::Happy];
    let told = [
        exchange(&mut moving, "matrix.mood", Mood::Happy, true).await,
        exchange(&mut moving, "matrix.mood[]", moods, true).await,
        exchange(&mut moving, "matrix.pair", pair, true).await,
    ];
    format!("{told:?}")
}

async fn large_values() -> String {
    let mut moving = Moving::connect().await;
    let text = "0123456789".repeat(LARGE_BYTES / 10);
    let query = sqlx::query_scalar("SELECT $1::text").bind(&text);
    let back: String = query.fetch_one(moving.connection().await).await.unwrap();
    assert!(back == text);
    let raw = all_bytes().repeat(LARGE_BYTES / 256);
    let query = sqlx::query_scalar("SELECT $1::bytea").bind(&raw);
    let back: Vec<u8> = query.fetch_one(moving.connection().await).await.unwrap();
    assert!(back == raw);
    // As a simple query: kept as a statement, it is past what a pool shares.
    let query = AssertSqlSafe(format!("SELECT length('{text}')"));
    let query = sqlx::raw_sql(query);
    let row = query.fetch_one(moving.connection().await).await.unwrap();
    row.get::<i32, _>(0).to_string()
}
