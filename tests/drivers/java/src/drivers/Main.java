package drivers;

/** pgjdbc and HikariCP. */
final class Main {
    private Main() {}

    public static void main(String[] arguments) throws Exception {
        Connecting.declare();
        Values.declare();
        Statements.declare();
        Batches.declare();
        Transactions.declare();
        Failures.declare();
        Streams.declare();
        Sessions.declare();
        Pools.declare();
        Report.run();
    }
}
