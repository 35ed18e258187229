//! The driver's pool.

use crate::connections::options;
use drivers::test;
use futures_util::future::join_all;
use sqlx::AssertSqlSafe;
use sqlx::postgres::{PgPool, PgPoolOptions};
use std::time::Duration;

pub fn add() {
    test("pool", pool);
    test("pool of transactions", pool_of_transactions);
    test("pool after queries given up", pool_after_queries_given_up);
}

const POOL_SIZE: u32 = 20;
const POOL_QUERIES: i64 = 1000;

async fn open() -> PgPool {
    let pool = PgPoolOptions::new().max_connections(POOL_SIZE);
    pool.connect_with(options()).await.unwrap()
}

async fn pool() -> String {
    let pool = open().await;
    let all = (0..POOL_QUERIES).map(|number| {
        let pool = pool.clone();
        tokio::spawn(async move {
            let query = AssertSqlSafe(format!("SELECT $1::int8 + {}", number % 25));
            let query = sqlx::query_scalar::<_, i64>(query).bind(number);
            query.fetch_one(&pool).await.unwrap()
        })
    });
    let total: i64 = join_all(all).await.into_iter().map(Result::unwrap).sum();
    assert!(pool.size() <= POOL_SIZE);
    pool.close().await;
    format!("{total}")
}

/// Money goes to and fro; none may be lost or made.
async fn pool_of_transactions() -> String {
    let pool = open().await;
    let change = "UPDATE matrix.account SET balance = balance + $2 WHERE id = $1";
    let all = (0..300).map(|number| {
        let pool = pool.clone();
        tokio::spawn(async move {
            let mut transaction = pool.begin().await.unwrap();
            // In the order of their ids, so that no two wait for each other.
            let from = 1 + number % 9;
            for (id, amount) in [(from, -number), (from + 1, number)] {
                let query = sqlx::query(change).bind(id).bind(amount);
                query.execute(&mut *transaction).await.unwrap();
            }
            if number % 10 != 0 {
                transaction.commit().await.unwrap();
            }
        })
    });
    for each in join_all(all).await {
        each.unwrap();
    }
    let query = sqlx::query_scalar("SELECT array_agg(balance ORDER BY id) FROM matrix.account");
    let balances: Vec<i32> = query.fetch_one(&pool).await.unwrap();
    format!("{balances:?}")
}

/// Every third query is given up; its connection is used again all the same.
async fn pool_after_queries_given_up() -> String {
    let pool = open().await;
    let all = (0..90).map(|number| {
        let pool = pool.clone();
        tokio::spawn(async move {
            if number % 3 == 0 {
                let query = sqlx::query("SELECT pg_sleep(0.2)").execute(&pool);
                let _ = tokio::time::timeout(Duration::from_millis(50), query).await;
                return 0;
            }
            let query = sqlx::query_scalar("SELECT $1::int").bind(number);
            query.fetch_one(&pool).await.unwrap()
        })
    });
    let total: i32 = join_all(all).await.into_iter().map(Result::unwrap).sum();
    format!("{total}")
}
