//! deadpool, with its three ways of checking what comes back.

use crate::clients::{config, one, until_it_runs};
use deadpool_postgres::{Manager, ManagerConfig, Pool, RecyclingMethod};
use drivers::test;
use futures_util::future::join_all;
use tokio_postgres::NoTls;

pub fn add() {
    test("pool", || pool(RecyclingMethod::Fast));
    test("pool that verifies", || pool(RecyclingMethod::Verified));
    test("pool that cleans", || pool(RecyclingMethod::Clean));
    test("pool of transactions", pool_of_transactions);
    test("pool after cancels", pool_after_cancels);
}

const POOL_SIZE: usize = 20;
const POOL_QUERIES: i64 = 1000;

fn open(recycling_method: RecyclingMethod) -> Pool {
    let manager = Manager::from_config(config(), NoTls, ManagerConfig { recycling_method });
    Pool::builder(manager).max_size(POOL_SIZE).build().unwrap()
}

async fn pool(recycling_method: RecyclingMethod) -> String {
    let pool = open(recycling_method);
    let all = (0..POOL_QUERIES).map(|number| {
        let pool = pool.clone();
        tokio::spawn(async move {
            let client = pool.get().await.unwrap();
            let query = format!("SELECT $1::int8 + {}", number % 25);
            let statement = client.prepare_cached(&query).await.unwrap();
            client
                .query_one(&statement, &[&number])
                .await
                .unwrap()
                .get::<_, i64>(0)
        })
    });
    let sums = join_all(all).await.into_iter().map(Result::unwrap);
    let total: i64 = sums.sum();
    assert!(pool.status().size <= POOL_SIZE);
    format!("{total}")
}

/// Money goes to and fro; none may be lost or made.
async fn pool_of_transactions() -> String {
    let pool = open(RecyclingMethod::Fast);
    let change = "UPDATE matrix.account SET balance = balance + $2 WHERE id = $1";
    let all = (0..300).map(|number| {
        let pool = pool.clone();
        tokio::spawn(async move {
            let mut client = pool.get().await.unwrap();
            let transaction = client.transaction().await.unwrap();
            // In the order of their ids, so that no two wait for each other.
            let from = 1 + number % 9;
            transaction
                .execute(change, &[&from, &-number])
                .await
                .unwrap();
            transaction
                .execute(change, &[&(from + 1), &number])
                .await
                .unwrap();
            if number % 10 != 0 {
                transaction.commit().await.unwrap();
            }
        })
    });
    for each in join_all(all).await {
        each.unwrap();
    }
    let query = "SELECT array_agg(balance ORDER BY id) FROM matrix.account";
    let client = pool.get().await.unwrap();
    format!("{:?}", one::<Vec<i32>>(&client, query, &[]).await)
}

/// Every third query is cancelled; the pool goes on.
async fn pool_after_cancels() -> String {
    let pool = open(RecyclingMethod::Fast);
    let all = (0..60).map(|number| {
        let pool = pool.clone();
        tokio::spawn(async move {
            let client = pool.get().await.unwrap();
            if number % 3 != 0 {
                return one::<i32>(&client, "SELECT $1::int", &[&number]).await;
            }
            let query = format!("SELECT pg_sleep(60) /* tokio-postgres: pool {number} */");
            let token = client.cancel_token();
            let (ended, ()) = tokio::join!(client.batch_execute(&query), async {
                until_it_runs(&query).await;
                token.cancel_query(NoTls).await.unwrap();
            });
            assert!(ended.is_err());
            0
        })
    });
    let total: i32 = join_all(all).await.into_iter().map(Result::unwrap).sum();
    format!("{total}")
}
